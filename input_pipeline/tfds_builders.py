"""TFDS's own data sets: find them where TFDS prepared them, or have TFDS download them."""

import http.client
import threading
import urllib.request

import tensorflow_datasets as tfds
from etils import epath

from llvq.errors import UserError, first_line

_SECONDS = 8.0  # for a web address to answer


def find(name: str, data_dir: epath.Path) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set, which may be prepared in `data_dir` or not.

    Raises:
      UserError: if what was prepared there is damaged.
    """
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as error:  # TFDS and its parsers raise errors of many types
        raise UserError(
            f"{data_dir / name} cannot be read ({type(error).__name__}): delete it to have it "
            "prepared anew"
        ) from error


def download(name: str, data_dir: epath.Path, url: str, remedy: str) -> tfds.core.DatasetBuilder:
    """Has TFDS download and prepare a data set as ArrayRecord.

    Args:
      name: TFDS's name of the data set.
      data_dir: where TFDS prepares it.
      url: a web address that must answer first, because TFDS would retry for minutes.
      remedy: what to do if the download fails, for the message.

    Raises:
      UserError: if the download fails.
    """
    builder = tfds.builder(
        name, data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD, try_gcs=False
    )
    try:
        if (problem := _cannot_reach(url)) is not None:
            raise OSError(problem)
        builder.download_and_prepare()
    except Exception as error:  # TFDS, its HTTP library and its parsers raise errors of many types
        raise UserError(
            f"{name} is not in {data_dir} and cannot be downloaded from {url} "
            f"({first_line(error)}): {remedy}"
        ) from error
    return builder


def _cannot_reach(url: str) -> str | None:
    """Why a web address does not answer in time, name look-up included; None if it answers."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_SECONDS).close()
            outcome.append(None)
        except (OSError, http.client.HTTPException) as error:  # urllib's own are OSErrors too
            outcome.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up cannot be interrupted
    thread.start()
    thread.join(_SECONDS)
    return outcome[0] if outcome else f"no answer in {_SECONDS:.0f} s"
