"""Data sets that are small enough to be held in memory."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import UInt8

from input_pipeline.pipeline import BatchT

Images = UInt8[np.ndarray, "n height width channels"]


class Arrays:
    """A data set of several splits in memory, never mirrored.

    Picking a batch from an array takes less time than handing it to tf.data would.

    Attributes:
      num_images: the number of images in each split.
      image_shape: of every image, (height, width, channels).
    """

    def __init__(self, splits: Mapping[str, Images]) -> None:
        """Args:
        splits: the images of each split, all of one shape.
        """
        self._splits = splits
        (self.image_shape,) = {images.shape[1:] for images in splits.values()}
        self.num_images = {split: len(images) for split, images in splits.items()}

    def batches(
        self, split: str, index_batches: Iterable[BatchT]
    ) -> Iterator[tuple[BatchT, Images]]:
        """Each index batch with its images, in order.

        Args:
          split: a key of `num_images`.
          index_batches: may be endless.
        """
        for batch in index_batches:
            yield batch, self._splits[split][batch.index]

    def resident(self, split: str) -> Images:
        """All images of a split."""
        return self._splits[split]
