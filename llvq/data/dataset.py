"""The interface between data sets and their users, training and evaluation."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from llvq.data.order import IndexBatch

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
