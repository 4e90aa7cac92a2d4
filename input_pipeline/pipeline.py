"""From index batches to batches of images: tf.data reads, decodes and flips ahead of training."""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Int

from input_pipeline import records
from input_pipeline.host_tensorflow import tf
from input_pipeline.records import RecordSource
from llvq.data import Images, IndexBatch
from llvq.errors import UserError

# These bound the memory: encoded batches being read, and finished reads that wait. Decoding holds
# one image per core besides.
_READS_AT_ONCE = 4
_READS_AHEAD = 2


def _message(error: Exception) -> str:
    """The message of an error, without the names of TensorFlow's operations."""
    return " ".join(re.sub(r"{{.*?}}|\[Op:.*", "", str(error)).split())[:200]


class Pipeline:
    """A data set of several splits, read batch by batch through tf.data; see llvq.data.Dataset.

    Attributes:
      num_images: the number of images in each split.
      image_shape: the shape of every image, (height, width, channels).
      fingerprint: see `llvq.data.Dataset`.
    """

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        image_shape: tuple[int, int, int],
        decode: Callable[[tf.Tensor], tf.Tensor],
        *,
        flip: bool = True,
        fingerprint: str = "",
    ) -> None:
        """Args:
        sources: for each split its encoded images.
        image_shape: the shape of every decoded image, (height, width, channels).
        decode: turns an encoded image (a string tensor) into its pixels (uint8), in TensorFlow.
        flip: whether images are mirrored where index batches say so.
        fingerprint: see `llvq.data.Dataset`.
        """
        self._sources = sources
        self._decode = decode
        self._flip = flip
        self.image_shape = image_shape
        self.fingerprint = fingerprint
        self.num_images = {split: len(source) for split, source in sources.items()}

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        """Yields each index batch with its images, in order, read ahead in the background.

        Args:
          split: a key of `num_images`.
          index_batches: batches of one size; may be endless. Some are taken ahead of time.

        Raises:
          UserError: if an image is damaged.
        """
        source = self._sources[split]
        iterator = iter(index_batches)
        first = next(iterator, None)
        if first is None:
            return
        under_way: collections.deque[IndexBatch] = collections.deque()

        def reads() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in itertools.chain([first], iterator):
                under_way.append(batch)
                yield batch.index, batch.flip

        dataset = tf.data.Dataset.from_generator(
            reads,
            output_signature=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.bool)),
        )
        dataset = self._read_and_decode(dataset, source, len(first.index))
        arrays = dataset.prefetch(_READS_AHEAD).as_numpy_iterator()
        while True:
            try:
                images = next(arrays, None)
            except tf.errors.OpError as error:
                raise self._explain(split, source, under_way[0].index, error) from error
            if images is None:
                return
            yield under_way.popleft(), images

    def resident(self, split: str) -> Images | None:
        """None: no split is in memory."""

    def _read_and_decode(
        self, dataset: tf.data.Dataset, source: RecordSource, batch_size: int
    ) -> tf.data.Dataset:
        """From batches of (index, flip) to batches of images."""

        def read(index: tf.Tensor, flip: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            examples = tf.numpy_function(lambda i: source[i], [index], tf.string, stateful=False)
            return records.image_bytes(tf.ensure_shape(examples, [None])), flip

        def finish(encoded: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
            image = tf.ensure_shape(self._decode(encoded), self.image_shape)
            if not self._flip:
                return image
            # Reverses no axis or the width, many times faster than choosing between the image and
            # its mirror image.
            return tf.reverse(image, axis=tf.fill([tf.cast(flip, tf.int32)], 1))

        dataset = dataset.map(read, num_parallel_calls=_READS_AT_ONCE, deterministic=True)
        dataset = dataset.unbatch()
        dataset = dataset.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return dataset.batch(batch_size)

    def _explain(
        self, split: str, source: RecordSource, batch: Int[np.ndarray, "n"], error: Exception
    ) -> UserError:
        """Reads a batch's images one by one, and returns an error that names the damaged one."""
        for index in batch:
            try:
                (encoded,) = records.image_bytes(source[np.array([index])])
                tf.ensure_shape(self._decode(encoded), self.image_shape)
            except Exception as cause:  # ArrayRecord and TensorFlow raise errors of many types
                return UserError(
                    f"{source.where(index)}: image {index} of split {split!r} cannot be read: "
                    f"{_message(cause)}; {source.remedy}"
                )
        return UserError(f"images of split {split!r} cannot be read: {_message(error)}")
