"""A data set of NumPy arrays."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from llvq.data.dataset import Images
from llvq.data.order import IndexBatch


class ArrayDataset:
    """A data set held in memory, for training from plain NumPy arrays.

        data = ArrayDataset(train=images, validation=held_out)

    Attributes:
      num_images: the number of images in each split.
      image_shape: the shape of every image, (height, width, channels).
    """

    def __init__(
        self, *, flip: bool = False, fingerprint: str | None = None, **splits: Images
    ) -> None:
        """Args:
          flip: whether training mirrors each image left to right with probability ½.
          fingerprint: see `Dataset`; by default a digest of the images.
          **splits: the images of each split, uint8 [n, height, width, channels].

        Raises:
          ValueError: if a split is not such an array, or the splits differ in image shape.
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
        self._fingerprint = fingerprint
        self.num_images = {split: len(images) for split, images in splits.items()}

    @property
    def fingerprint(self) -> str:
        """See `Dataset`."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for images in self._splits.values():
                digest.update(np.ascontiguousarray(images).data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        """Yields each index batch with its images, in order; `index_batches` may be endless."""
        for batch in index_batches:
            images = self._splits[split][batch.index]
            if self._flip:
                images = np.where(batch.flip[:, None, None, None], images[:, :, ::-1], images)
            yield batch, images

    def resident(self, split: str) -> Images | None:
        """All images of a split; None if training mirrors some of them."""
        return None if self._flip else self._splits[split]
