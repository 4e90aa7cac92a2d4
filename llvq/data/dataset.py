"""The interface between data sets and their users, training and evaluation."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from llvq.data.order import IndexBatch
from llvq.errors import UserError

Images = UInt8[np.ndarray, "n height width channels"]


class Dataset(Protocol):
    """Images by split ("train", "validation" and possibly "test") and index."""

    @property
    def num_images(self) -> Mapping[str, int]:
        """The number of images in each split."""
        ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of every image: (height, width, channels)."""
        ...

    @property
    def fingerprint(self) -> str:
        """A string that other images of this name, number and shape lack; "" if there are none."""
        ...

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        """Yields each index batch with its images, uint8 [n, height, width, channels]."""
        ...

    def resident(self, split: str) -> Images | None:
        """All images of a split if they are in memory and never mirrored, else None."""
        ...


def check_data(data: Dataset, image_shape: tuple[int, ...]) -> None:
    """Raises UserError unless a data set has what training and evaluation need.

    That is the splits "train" and "validation", with images in them.

    Args:
      data: the data set.
      image_shape: that the model takes; a height or width of 0 stands for any.
    """
    for split in ("train", "validation"):
        if not data.num_images.get(split):
            raise UserError(
                f"the data set has no images in a split {split!r} (its splits: "
                f"{', '.join(data.num_images)}): training and evaluation need one"
            )
    shape = tuple(data.image_shape)
    if any(ours not in (0, theirs) for ours, theirs in zip(image_shape, shape, strict=True)):
        raise UserError(
            f"config.model.image_shape={tuple(image_shape)}: must be {shape}, the shape of the "
            "data set's images"
        )
