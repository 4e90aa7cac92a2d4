"""Files that are written completely or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator

from etils import epath

from llvq.errors import UserError


@contextlib.contextmanager
def replacing(path: epath.PathLike, *, mark: str = "unfinished") -> Iterator[epath.Path]:
    """Yields the path of a new file, which replaces `path` when the context ends without error.

    After an error the new file is deleted, and `path` is unchanged. The new file's name ends in
    `mark`; a process that is killed leaves it, and the next one with the same mark overwrites it.
    """
    target = epath.Path(path)
    unfinished = target.with_name(f"{target.name}.{mark}")
    try:
        yield unfinished
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[epath.Path]:
    """As `replacing`, for a file that the user asked for; two processes may write it at once.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        with replacing(path, mark=f"{uuid.uuid4().hex[:8]}.unfinished") as unfinished:
            yield unfinished
    except OSError as error:
        name = os.fspath(path)
        raise UserError(f"{name} cannot be written ({error.strerror or error})") from error
