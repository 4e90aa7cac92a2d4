"""From index batches to batches of images: tf.data reads, decodes and flips ahead of training."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import tensorflow as tf
from jaxtyping import Bool, Int, UInt8


class Source(Protocol):
    """Images with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n h w c"]:
        """The images of some indices. Called from tf.data's threads."""
        ...


class Batch(Protocol):
    """Which images to read, and which of them to mirror."""

    @property
    def index(self) -> Int[np.ndarray, "n"]: ...

    @property
    def flip(self) -> Bool[np.ndarray, "n"]: ...


BatchT = TypeVar("BatchT", bound=Batch)


class Pipeline:
    """A data set of several splits, read batch by batch.

    Attributes:
      num_images: the number of images in each split.
      image_shape: of every image, (height, width, channels).
    """

    def __init__(
        self, sources: Mapping[str, Source], image_shape: tuple[int, int, int], *, flip: bool
    ) -> None:
        """Args:
        sources: the images of each split.
        image_shape: of every image, (height, width, channels).
        flip: whether to mirror the images whose index batch says so.
        """
        self._sources = sources
        self.image_shape = image_shape
        self._flip = flip
        self.num_images = {split: len(source) for split, source in sources.items()}

    def batches(
        self, split: str, index_batches: Iterable[BatchT]
    ) -> Iterator[tuple[BatchT, UInt8[np.ndarray, "n height width channels"]]]:
        """Each index batch with its images, in order, read ahead in the background.

        Args:
          split: a key of `num_images`.
          index_batches: may be endless; read a few batches ahead.
        """
        source = self._sources[split]
        under_way: collections.deque[BatchT] = collections.deque()

        def indices() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in index_batches:
                under_way.append(batch)
                yield batch.index, batch.flip

        def read(index: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
            images = tf.numpy_function(lambda i: source[i], [index], tf.uint8, stateful=False)
            images = tf.ensure_shape(images, (None, *self.image_shape))
            if self._flip:
                images = tf.where(flip[:, None, None, None], images[:, :, ::-1], images)
            return images

        dataset = tf.data.Dataset.from_generator(
            indices,
            output_signature=(tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.bool)),
        )
        dataset = dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        for images in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
            yield under_way.popleft(), images
