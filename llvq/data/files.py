"""Files that are written completely or not at all."""

import contextlib
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields the path of a new file, which replaces `path` when the context ends without error.

    After an error the new file is deleted, and `path` is unchanged.
    """
    target = epath.Path(path)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
