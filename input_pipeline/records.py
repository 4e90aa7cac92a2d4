"""Encoded images in the ArrayRecord shards of a directory that TFDS describes, read by index."""

import bisect
import contextlib
import itertools
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Int

from input_pipeline.errors import DataError

_SHARDS_AT_ONCE = 32  # opened to count their records: what takes time is a remote file system


class RecordSource:
    """The images of a split as serialised examples; `image_bytes` takes the image out of one."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        num_images: int,
        order: Int[np.ndarray, "n"] | None = None,
        remedy: str = "delete dataset_info.json beside it to have what is damaged prepared again",
    ) -> None:
        """Args:
          builder: of a directory prepared as ArrayRecord.
          split: which to read.
          num_images: how many images the split must have.
          order: where each image lies among the stored ones; as stored if None.
          remedy: what to do about a damaged record, for messages.

        Raises:
          DataError: if a shard is missing or incomplete, or the number of images is another.
        """
        info = builder.info.splits[split]
        _check_shards(info.filepaths, info.shard_lengths)
        if info.num_examples != num_images:
            raise DataError(
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
        """The examples of some images: [n] of bytes objects, read from all their shards at once."""
        return np.array(self._records.__getitems__(self._order[index].tolist()), dtype=object)

    def where(self, index: int) -> str:
        """The shard of an image and its place in it, for messages."""
        position = int(self._order[index])
        shard = bisect.bisect_right(self._ends, position)
        return f"record {position - ([0, *self._ends][shard])} of {self._shards[shard]}"


def find_builder(name: str, data_dir: epath.Path) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set, prepared in a directory or not.

    Raises:
      DataError: if what was prepared there is damaged.
    """
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as error:  # TFDS and its JSON and protobuf parsers raise whatever they like
        raise DataError(
            f"{data_dir / name} cannot be read ({type(error).__name__}): delete it to have it "
            "prepared anew"
        ) from error


def image_bytes(examples: tf.Tensor) -> tf.Tensor:
    """The encoded images (string tensor [n]) in serialised examples [n], in TensorFlow."""
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    return tf.io.parse_example(examples, features)["image"]


def _check_shards(shards: Sequence[epath.Path], lengths: Sequence[int]) -> None:
    """ArrayRecord itself takes an absent or truncated shard for an empty one, without a word."""
    with futures.ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        found = list(pool.map(_count_records, shards))
    for shard, length, records in zip(shards, lengths, found, strict=True):
        if records != length:
            what = "is missing" if records is None else f"has {records} records, not {length}"
            raise DataError(
                f"{shard} {what}: put it back, or delete {shard.parent / 'dataset_info.json'} to "
                "have what is missing prepared again"
            )


def _count_records(shard: epath.Path) -> int | None:
    if not shard.exists():
        return None
    reader = array_record_module.ArrayRecordReader(str(shard), options="readahead_buffer_size:0")
    num_records = reader.num_records()
    with contextlib.suppress(RuntimeError):  # what closing a damaged shard raises
        reader.close()
    return num_records
