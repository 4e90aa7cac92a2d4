"""Encoded images in ArrayRecord shards that TFDS describes, read by index."""

import bisect
import contextlib
import itertools
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Int

from input_pipeline.host_tensorflow import tf
from llvq.errors import UserError

_SHARDS_AT_ONCE = 32  # opened at once to count records, because remote file systems are slow


class RecordSource:
    """The images of a split as serialised examples; see `image_bytes`."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        num_images: int,
        order: Int[np.ndarray, "n"] | None = None,
        remedy: str = "delete dataset_info.json beside it to have damaged shards prepared again",
    ) -> None:
        """Args:
          builder: TFDS's builder of a directory prepared as ArrayRecord.
          split: the split to read.
          num_images: the number of images that the split must have.
          order: the stored position of each image; the stored order if None.
          remedy: what to do about a damaged record, for messages.

        Raises:
          UserError: if a shard is missing or incomplete, or the number of images differs.
        """
        info = builder.info.splits[split]
        _check_shards(info.filepaths, info.shard_lengths)
        if info.num_examples != num_images:
            raise UserError(
                f"{builder.data_path} has {info.num_examples} images in split {split!r}, not "
                f"{num_images}: move it away to have it prepared again"
            )
        self.remedy = remedy
        self._shards = info.filepaths
        self._ends = list(itertools.accumulate(info.shard_lengths))
        self._order = np.arange(num_images) if order is None else order
        self._records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Int[np.ndarray, "n"]) -> np.ndarray:
        """Reads the examples of some images: an array [n] of bytes objects."""
        return np.array(self._records.__getitems__(self._order[index].tolist()), dtype=object)

    def where(self, index: int) -> str:
        """The position of an image in its shard, for messages."""
        position = int(self._order[index])
        shard = bisect.bisect_right(self._ends, position)
        return f"record {position - ([0, *self._ends][shard])} of {self._shards[shard]}"


def image_bytes(examples: tf.Tensor) -> tf.Tensor:
    """Extracts the encoded images, a string tensor [n], from serialised examples [n]."""
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    return tf.io.parse_example(examples, features)["image"]


def _check_shards(shards: Sequence[epath.Path], lengths: Sequence[int]) -> None:
    """Raises UserError for missing or truncated shards, which ArrayRecord itself reads as empty."""
    with futures.ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        found = list(pool.map(_count_records, shards))
    for shard, length, records in zip(shards, lengths, found, strict=True):
        if records != length:
            what = "is missing" if records is None else f"has {records} records, not {length}"
            raise UserError(
                f"{shard} {what}: put it back, or delete {shard.parent / 'dataset_info.json'} to "
                "have the missing images prepared again"
            )


def _count_records(shard: epath.Path) -> int | None:
    if not shard.exists():
        return None
    reader = array_record_module.ArrayRecordReader(str(shard), options="readahead_buffer_size:0")
    num_records = reader.num_records()
    with contextlib.suppress(RuntimeError):  # closing a damaged shard raises it
        reader.close()
    return num_records
