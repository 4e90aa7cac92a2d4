"""Image files as people hold them: in a folder, or in a zip of that folder."""

import zipfile
from collections.abc import Iterable

from etils import epath

from input_pipeline.errors import DataError


class ImageFiles:
    """Reads files of a folder, or of the zip of it, by their path within the folder."""

    def __init__(self, path: epath.Path) -> None:
        """Args:
          path: the folder, or its zip.

        Raises:
          DataError: if it is a zip that is damaged or has a file twice.
        """
        self._path = path
        self._zip = None if path.is_dir() else _open_zip(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist() if self._zip else ():
            name = member.filename.removeprefix(f"{path.stem}/")
            if name in self._members:
                raise DataError(f"{path} has {name} twice: fetch it again")
            self._members[name] = member

    def num_bytes(self, names: Iterable[str]) -> int:
        """The size of some files together.

        Raises:
          DataError: if one is missing; it is named.
        """
        total = 0
        for name in names:
            try:
                total += self._size(name)
            except (OSError, KeyError) as error:
                raise DataError(f"{self._path} lacks {name}: fetch it again") from error
        return total

    def read(self, name: str) -> tuple[str, bytes]:
        """The file's name in messages, and its content.

        Raises:
          DataError: if it is missing or cannot be read.
        """
        path = self._path / name
        try:
            content = (
                path.read_bytes() if self._zip is None else self._zip.read(self._members[name])
            )
        except Exception as error:  # zipfile raises whatever it meets in a damaged file
            raise _unreadable(path, error) from error
        return str(path), content

    def _size(self, name: str) -> int:
        if self._zip is None:
            return (self._path / name).stat().length
        return self._members[name].file_size


def find(directory: epath.Path, stem: str) -> ImageFiles | None:
    """The folder of a name in a directory, or else its zip, if there is one."""
    for path in (directory / stem, directory / f"{stem}.zip"):
        if path.exists():
            return ImageFiles(path)
    return None


def _open_zip(path: epath.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path.open("rb"))
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _unreadable(path: epath.Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error!s:.200}): fetch it again")
