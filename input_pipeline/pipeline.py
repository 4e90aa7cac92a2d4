"""From index batches to batches of images: tf.data reads, decodes and flips ahead of training."""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import tensorflow as tf
from jaxtyping import Bool, Int, UInt8

from input_pipeline.errors import DataError

_BATCHES_AHEAD = 2  # of up to 100 MB each


class Source(Protocol):
    """Images with random access, as pixels or encoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[np.ndarray, "n"]) -> np.ndarray:
        """The images of some indices: uint8 [n, h, w, c], or n encoded ones (bytes objects).

        Called from tf.data's threads, once for a whole batch.
        """
        ...


@runtime_checkable
class Located(Protocol):
    """A source that knows where its images lie."""

    def where(self, index: int) -> str:
        """Of one image: its file and its place in it."""
        ...


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
    """A data set of several splits, read batch by batch.

    Attributes:
      num_images: the number of images in each split.
      image_shape: of every image, (height, width, channels).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        image_shape: tuple[int, int, int],
        *,
        flip: bool,
        decode: Callable[[tf.Tensor], tf.Tensor] | None = None,
    ) -> None:
        """Args:
        sources: the images of each split.
        image_shape: of every image, (height, width, channels), once decoded.
        flip: whether to mirror the images whose index batch says so.
        decode: an encoded image (a string tensor) to its pixels (uint8), in TensorFlow; None where
          sources hold pixels.
        """
        self._sources = sources
        self._decode = decode
        self._flip = flip
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
            dtype = tf.uint8 if self._decode is None else tf.string
            return tf.numpy_function(lambda i: source[i], [index], dtype, stateful=False), flip

        def finish(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
            image = image if self._decode is None else self._decode(image)
            image = tf.ensure_shape(image, self.image_shape)
            return tf.where(flip, image[:, ::-1], image) if self._flip else image

        parallel = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
        dataset = tf.data.Dataset.from_generator(
            indices,
            output_signature=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.bool)),
        )
        dataset = dataset.map(read, **parallel)
        if self._decode is None and not self._flip:  # whole batches are ready as they are
            dataset = dataset.map(
                lambda images, _: tf.ensure_shape(images, (None, *self.image_shape))
            )
        else:
            dataset = dataset.unbatch().map(finish, **parallel).batch(len(first.index))
        batches = dataset.prefetch(_BATCHES_AHEAD).as_numpy_iterator()
        while True:
            try:
                images = next(batches, None)
            except tf.errors.OpError as error:
                raise self._explain(split, under_way[0].index, error) from error
            if images is None:
                return
            yield under_way.popleft(), images

    def _explain(self, split: str, batch: Int[np.ndarray, "n"], error: Exception) -> DataError:
        """Finds the damaged image of a batch, one by one, for an error that names it."""
        source = self._sources[split]
        for index in batch:
            try:
                (image,) = source[np.array([index])]
                if self._decode is not None:
                    tf.ensure_shape(self._decode(image), self.image_shape)
            except Exception as cause:  # whatever the source and TensorFlow raise
                message = f"image {index} of split {split!r} cannot be read: {_one_line(cause)}"
                if isinstance(source, Located):
                    message = f"{source.where(index)}: {message}; delete dataset_info.json beside "
                    message += "it to have what is damaged prepared again"
                return DataError(message)
        return DataError(f"images of split {split!r} cannot be read: {_one_line(error)}")
