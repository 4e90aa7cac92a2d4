"""From index batches to batches of images: tf.data reads, decodes and flips ahead of training."""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import tensorflow as tf
from jaxtyping import Bool, Int, UInt8

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.records import RecordSource

# What bounds the memory: encoded batches being read, and decoded ones that wait. Decoding takes
# one image a core besides.
_READS_AT_ONCE = 4
_BATCHES_AHEAD = 2


class Batch(Protocol):
    """Which images to read, and which of them to mirror."""

    @property
    def index(self) -> Int[np.ndarray, "n"]: ...

    @property
    def flip(self) -> Bool[np.ndarray, "n"]: ...


BatchT = TypeVar("BatchT", bound=Batch)


def _one_line(error: Exception) -> str:
    """What an error says, without the names of TensorFlow's operations."""
    return " ".join(re.sub(r"{{.*?}}|\[Op:.*", "", str(error)).split())[:200]


class Pipeline:
    """A data set of encoded images in several splits, read batch by batch.

    Attributes:
      num_images: the number of images in each split.
      image_shape: of every image, (height, width, channels).
    """

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        image_shape: tuple[int, int, int],
        decode: Callable[[tf.Tensor], tf.Tensor],
    ) -> None:
        """Args:
        sources: the images of each split.
        image_shape: of every image, (height, width, channels), once decoded.
        decode: an encoded image (a string tensor) to its pixels (uint8), in TensorFlow.
        """
        self._sources = sources
        self._decode = decode
        self.image_shape = image_shape
        self.num_images = {split: len(source) for split, source in sources.items()}

    def batches(
        self, split: str, index_batches: Iterable[BatchT]
    ) -> Iterator[tuple[BatchT, UInt8[np.ndarray, "n height width channels"]]]:
        """Each index batch with its images, in order, read ahead in the background.

        Args:
          split: a key of `num_images`.
          index_batches: may be endless; read a few batches ahead. All of one size.

        Raises:
          DataError: if an image is damaged.
        """
        source = self._sources[split]
        under_way: collections.deque[BatchT] = collections.deque()
        upcoming = iter(index_batches)
        first = next(upcoming, None)
        if first is None:
            return

        def indices() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in itertools.chain([first], upcoming):
                under_way.append(batch)
                yield batch.index, batch.flip

        def read(index: tf.Tensor, flip: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            examples = tf.numpy_function(lambda i: source[i], [index], tf.string, stateful=False)
            return records.image_bytes(tf.ensure_shape(examples, [None])), flip

        def finish(encoded: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
            image = tf.ensure_shape(self._decode(encoded), self.image_shape)
            # Along no axis or along the width: many times faster than choosing between the image
            # and its mirror image.
            return tf.reverse(image, axis=tf.fill([tf.cast(flip, tf.int32)], 1))

        dataset = tf.data.Dataset.from_generator(
            indices,
            output_signature=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.bool)),
        )
        dataset = dataset.map(read, num_parallel_calls=_READS_AT_ONCE, deterministic=True)
        dataset = dataset.unbatch()
        dataset = dataset.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        dataset = dataset.batch(len(first.index)).prefetch(_BATCHES_AHEAD)
        batches = dataset.as_numpy_iterator()
        while True:
            try:
                images = next(batches, None)
            except tf.errors.OpError as error:
                raise self._explain(split, under_way[0].index, error) from error
            if images is None:
                return
            yield under_way.popleft(), images

    def resident(self, split: str) -> None:
        """None: images are read as they are needed."""

    def _explain(self, split: str, batch: Int[np.ndarray, "n"], error: Exception) -> DataError:
        """Finds the damaged image of a batch, one by one, for an error that names it."""
        source = self._sources[split]
        for index in batch:
            try:
                (encoded,) = records.image_bytes(source[np.array([index])])
                tf.ensure_shape(self._decode(encoded), self.image_shape)
            except Exception as cause:  # whatever ArrayRecord and TensorFlow raise
                return DataError(
                    f"{source.where(index)}: image {index} of split {split!r} cannot be read: "
                    f"{_one_line(cause)}; {source.remedy}"
                )
        return DataError(f"images of split {split!r} cannot be read: {_one_line(error)}")
