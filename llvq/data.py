"""What training and evaluation ask of a data set, and a data set made of NumPy arrays."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from llvq.order import IndexBatch

Images = UInt8[np.ndarray, "n height width channels"]


class Dataset(Protocol):
    """Images by split ("train", "validation" and, if there is one, "test") and index."""

    @property
    def num_images(self) -> Mapping[str, int]:
        """The number of images in each split."""
        ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of every image: (height, width, channels)."""
        ...

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        """Reads the images of each index batch: uint8 [n, height, width, channels]."""
        ...

    def resident(self, split: str) -> Images | None:
        """All images of a split, if they are in memory and never mirrored."""
        ...


class ArrayDataset:
    """A data set held in memory, for training from plain NumPy arrays.

    data = ArrayDataset(train=images, validation=held_out)
    """

    def __init__(self, *, flip: bool = False, **splits: Images) -> None:
        """Args:
          flip: whether training mirrors half of the images left to right.
          **splits: images of each split, uint8 [n, height, width, channels].

        Raises:
          ValueError: if a split is not such an array, or images differ in shape.
        """
        for split, images in splits.items():
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"split {split!r}: expected uint8 [n, height, width, channels], "
                    f"found {images.dtype} {list(images.shape)}"
                )
        shapes = {images.shape[1:] for images in splits.values()}
        if len(shapes) != 1:
            raise ValueError(f"all images must have one shape, found {sorted(shapes)}")
        (self.image_shape,) = shapes
        self._splits = splits
        self._flip = flip
        self.num_images = {split: len(images) for split, images in splits.items()}

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        for batch in index_batches:
            images = self._splits[split][batch.index]
            if self._flip:
                images = np.where(batch.flip[:, None, None, None], images[:, :, ::-1], images)
            yield batch, images

    def resident(self, split: str) -> Images | None:
        return None if self._flip else self._splits[split]
