"""Where data is, and images that people fetched by hand: in a folder, or in its zip."""

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from llvq.errors import UserError


class ImageFiles:
    """Reads the files of a folder or of its zip, by their paths within the folder."""

    def __init__(self, path: epath.Path) -> None:
        """Args:
          path: the folder, or its zip.

        Raises:
          UserError: if it is a zip that is damaged or has a file twice.
        """
        self._path = path
        self._zip = None if path.is_dir() else _open_zip(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist() if self._zip else ():
            name = member.filename.removeprefix(f"{path.stem}/")
            if name in self._members:
                raise UserError(f"{path} has {name} twice: fetch it again")
            self._members[name] = member

    def num_bytes(self, names: Iterable[str]) -> int:
        """The total size of some files.

        Raises:
          UserError: if one is missing; the message names it.
        """
        total = 0
        for name in names:
            try:
                total += self._size(name)
            except (OSError, KeyError) as error:
                raise UserError(f"{self._path} lacks {name}: fetch it again") from error
        return total

    def read(
        self, names: Mapping[str, Sequence[str]], split: str, positions: range
    ) -> Iterator[tuple[str, bytes]]:
        """Reads some files of a split; with `names` bound it is a `prepare.ReadImages`.

        Args:
          names: the names of each split's files.
          split: a key of `names`.
          positions: which of the split's files to read.

        Yields:
          For each file its name in messages and its content.

        Raises:
          UserError: if a file is missing or cannot be read.
        """
        for position in positions:
            name = names[split][position]
            yield str(self._path / name), self._read(name)

    def _read(self, name: str) -> bytes:
        path = self._path / name
        try:
            return path.read_bytes() if self._zip is None else self._zip.read(self._members[name])
        except Exception as error:  # zipfile raises errors of many types for damaged files
            raise _unreadable(path, error) from error

    def _size(self, name: str) -> int:
        if self._zip is None:
            return (self._path / name).stat().length
        return self._members[name].file_size


def data_directory(data_dir: str) -> epath.Path:
    """The directory of TFDS; its default if `data_dir` is empty."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return epath.Path(data_dir or default).expanduser()


def manual_directory(name: str, root: epath.Path, manual_dir: str) -> epath.Path:
    """The directory of a data set's files fetched by hand: `manual_dir`, or TFDS's if empty."""
    return epath.Path(manual_dir or root / "downloads/manual" / name).expanduser()


def find(directory: epath.Path, stem: str, *, required: bool) -> ImageFiles | None:
    """The folder named `stem` in a directory, or else its zip; None if there is neither.

    Raises:
      UserError: if there is neither although it is required, or if the zip is damaged.
    """
    for path in (directory / stem, directory / f"{stem}.zip"):
        if path.exists():
            return ImageFiles(path)
    if required:
        raise UserError(
            f"--config.dataset.manual_dir={directory}: found neither a folder {stem} nor "
            f"{stem}.zip in it"
        )
    return None


def _open_zip(path: epath.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path.open("rb"))
    except Exception as error:  # as in _read
        raise _unreadable(path, error) from error


def _unreadable(path: epath.Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error!s:.200}): fetch it again")
