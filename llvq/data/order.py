"""The input order: which images each batch holds.

Training reads one infinite stream. Epoch e is a permutation of the training images given by
(seed, e). Step s takes positions [s·B, (s+1)·B) of the stream; a batch may straddle two epochs, so
that every batch is full. The order therefore depends on seed and step alone, not on restarts,
hosts or devices. It comes from raw Philox bits, a stream that NumPy promises never to change.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class IndexBatch:
    """One host's share of a batch, before its images are read.

    Attributes:
      index: [n], the position of each image within its split.
      flip: [n], whether to mirror each image left to right; data sets without flips ignore it.
      mask: [n], False for images that only fill up an evaluation's last batch and must not count.
    """

    index: Int[np.ndarray, "n"]
    flip: Bool[np.ndarray, "n"]
    mask: Bool[np.ndarray, "n"]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """The number of batches that cover every image at least once."""
    return math.ceil(num_images / batch_size)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch(seed: int, epoch: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The permutation and the flips of one epoch, both [num_images], by position."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(2 * num_images)
    order, flips = bits[:num_images], bits[num_images:] & 1
    return np.argsort(order, kind="stable"), flips.astype(bool)


def _host_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def training_batches(
    num_images: int,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[IndexBatch]:
    """Yields the host's share of every training batch from `first_step` on, without end.

    Args:
      num_images: the number of images in the training split.
      batch_size: the number of images that all hosts take together; a multiple of process_count.
      seed: the seed of the order, at least 0.
      first_step: the step of the first batch, 0 for a new run.
      process_index: the index of this host, which takes its slice of each batch by position.
      process_count: the number of hosts.
    """
    share = _host_slice(batch_size, process_index, process_count)
    step = first_step
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[share]
        index = np.empty(len(positions), np.int64)
        flip = np.empty(len(positions), bool)
        epochs, within = np.divmod(positions, num_images)
        for epoch in np.unique(epochs):
            permutation, flips = _epoch(seed, int(epoch), num_images)
            here = epochs == epoch
            index[here] = permutation[within[here]]
            flip[here] = flips[within[here]]
        yield IndexBatch(index, flip, np.ones(len(positions), bool))
        step += 1


def evaluation_batches(
    num_images: int, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[IndexBatch]:
    """Yields the host's share of batches that hold every image once, in order and unflipped.

    Image 0, masked out, fills up the last batch. For the arguments see `training_batches`.
    """
    share = _host_slice(batch_size, process_index, process_count)
    for start in range(0, num_images, batch_size):
        positions = np.arange(start, start + batch_size)[share]
        mask = positions < num_images
        yield IndexBatch(np.where(mask, positions, 0), np.zeros(len(mask), bool), mask)
