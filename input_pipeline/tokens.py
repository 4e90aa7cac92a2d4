"""Writes a data set's tokens as ArrayRecord shards that TFDS and grain can read.

The directory is complete once it has manifest.json. Until then each finished shard has a note
beside it, so that the next process, after a kill, continues after the last of them; job.json says
what is being written.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int

from input_pipeline import shards
from input_pipeline.shards import Shard
from llvq.data.files import replacing
from llvq.errors import UserError

_ABOUT = {
    "description": "Tokens of images, written by llvq; see manifest.json.",
    "homepage": "https://arxiv.org/abs/2310.09382",
    "license": "that of the images",
}

_NOTES = {"sha256", "num_outside_vocabulary"}  # the fields of a finished shard's note


class TokenWriter:
    """Writes the tokens of one data set.

    Attributes:
      shards: what is to be written.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        name: str,
        num_images: Mapping[str, int],
        images_per_shard: int,
        token_shape: tuple[int, int],
        num_tokens: int,
    ) -> None:
        """Args:
        directory: where to write.
        name: of the data set.
        num_images: the number of images in each split.
        images_per_shard: the number of images in every shard but a split's last.
        token_shape: (height, width) of an image in tokens.
        num_tokens: how many different tokens there are; they are stored in the smallest unsigned
          integers that hold them.
        """
        self._directory = epath.Path(directory)
        self._name = f"{name}_tokens"
        self.shards = list(shards.plan(self._name, num_images, images_per_shard))
        self._dtype = np.min_scalar_type(num_tokens - 1)
        self._features = tfds.features.FeaturesDict(
            {
                "tokens": tfds.features.Tensor(
                    shape=token_shape, dtype=self._dtype, encoding=tfds.features.Encoding.BYTES
                )
            }
        )

    @property
    def is_complete(self) -> bool:
        """Whether everything is written."""
        return (self._directory / "manifest.json").exists()

    def begin(
        self, job: Mapping[str, Any], vocabulary: Int[np.ndarray, "tokens code_width"]
    ) -> None:
        """Makes the directory; one process does it before any writes.

        Args:
          job: what is written: all on which the tokens depend.
          vocabulary: the code of each token, for vocabulary.npy.

        Raises:
          UserError: if the directory holds another job's tokens, or cannot be written.
        """
        path = self._directory / "job.json"
        with _writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and _read_json(path) != job:
                raise UserError(
                    f"{self._directory} holds tokens of another model or data set: move it away"
                )
            _write_json(path, job)
            with replacing(self._directory / "vocabulary.npy") as file, file.open("wb") as stream:
                np.save(stream, vocabulary)

    def is_finished(self, shard: Shard) -> bool:
        """Whether a shard is written and still what it was."""
        note = _read_json(self._note(shard))
        path = self._directory / shard.file_name
        is_note = isinstance(note, dict) and note.keys() >= _NOTES
        return is_note and path.exists() and note["sha256"] == shards.sha256(path)

    def write(
        self, shard: Shard, tokens: Int[np.ndarray, "n height width"], num_outside: int
    ) -> None:
        """Writes a shard.

        Args:
          shard: of `shards`.
          tokens: of its images.
          num_outside: how many of them stand for a code outside the vocabulary.

        Raises:
          UserError: if it cannot be written.
        """
        path = self._directory / shard.file_name
        examples = (
            self._features.serialize_example({"tokens": image.astype(self._dtype)})
            for image in tokens
        )
        with _writing(path):
            digest = shards.write(path, examples)
            note = {"sha256": digest, "num_outside_vocabulary": num_outside}
            _write_json(self._note(shard), note)

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the directory, once all shards are written.

        Args:
          manifest: what it says besides the shards.

        Returns:
          The manifest.
        """
        with _writing(self._directory):
            shards.describe(self._directory, self._name, self.shards, self._features, _ABOUT)
            notes = {
                shard.file_name: {
                    "split": shard.split,
                    "num_images": len(shard.positions),
                    **_read_json(self._note(shard)),
                }
                for shard in self.shards
            }
            whole = {**manifest, "dtype": str(self._dtype), "shards": notes}
            _write_json(self._directory / "manifest.json", whole)
            for shard in self.shards:
                self._note(shard).unlink(missing_ok=True)
        return whole

    def _note(self, shard: Shard) -> epath.Path:
        return self._directory / f"{shard.file_name}.json"


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    """Raises UserError in place of what the file system or ArrayRecord raises."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written ({error})") from error


def _read_json(path: epath.Path) -> Any:
    """The contents of a file; None if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
