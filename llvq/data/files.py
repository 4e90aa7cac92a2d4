"""Files that are written whole or not at all."""

import contextlib
from collections.abc import Iterator

from etils import epath


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields the path of a new file, which takes the place of `path` when the context ends well.

    After an error nothing of it is left, and `path` is as it was.
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
