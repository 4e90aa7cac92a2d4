"""Feeds the devices in training: one batch per call of the compiled program, or several.

Where a step takes an accelerator less time than a call takes the host, a call takes several steps,
on images that the devices hold.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import TraceAnnotation
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from llvq.data import Dataset, Images, IndexBatch
from llvq.runtime import sharding

# In a loop, XLA computes a CPU's convolutions without Eigen, which is far slower.
_ONE_STEP_PER_CALL = ("cpu",)


class Call(NamedTuple):
    """Attributes:
    last_step: the number of its last step, counted from 1.
    num_steps: how many steps it takes.
    inputs: what the program takes besides the state: (images,), or (all images, index) with a row
      of the index for each step (see `train_step`).
    last_images: returns the images of the last step, on the devices.
    """

    last_step: int
    num_steps: int
    inputs: tuple[Array, ...]
    last_images: Callable[[], UInt8[Array, "batch height width channels"]]


def steps_per_call(most: int, stops: Iterable[int], mesh: Mesh) -> int:
    """Returns how many steps each call takes, such that logs and checkpoints fall between calls.

    Args:
      most: the upper bound.
      stops: the steps, and the intervals between steps, that something follows.
      mesh: the devices. On a CPU the result is 1.

    Returns:
      The largest divisor of `most` that also divides all stops.
    """
    if mesh.devices.flat[0].platform in _ONE_STEP_PER_CALL:
        return 1
    return math.gcd(most, *stops)


def one_by_one(
    data: Dataset, index_batches: Iterator[IndexBatch], first_step: int, num_steps: int, mesh: Mesh
) -> Iterator[Call]:
    """A call for each step after `first_step`, up to `num_steps`."""
    steps = range(first_step + 1, num_steps + 1)
    batches = data.batches("train", index_batches)
    for step, (_, local_images) in zip(steps, batches, strict=False):
        with TraceAnnotation("to_devices"):
            images = sharding.to_devices(local_images, mesh)
        yield Call(step, 1, (images,), functools.partial(lambda images: images, images))


def several(
    images: Images,
    index_batches: Iterator[IndexBatch],
    first_step: int,
    num_steps: int,
    mesh: Mesh,
    per_call: int,
) -> Iterator[Call]:
    """A call for each `per_call` steps after `first_step`, up to `num_steps`.

    Args:
      images: the training split, not mirrored; every device gets all of it.
      index_batches: of the steps after `first_step`.
      first_step: how many steps are done.
      num_steps: how many there are to be: a multiple of `per_call` more.
      mesh: the devices.
      per_call: how many steps a call takes.
    """
    # `replicate` would gather what each process has, to see that it is the same.
    resident = jax.make_array_from_process_local_data(sharding.replicated(mesh), images)
    for step in range(first_step + per_call, num_steps + 1, per_call):
        batches = itertools.islice(index_batches, per_call)
        index = np.stack([batch.index for batch in batches]).astype(np.int32)
        with TraceAnnotation("to_devices"):
            rows = jax.make_array_from_process_local_data(sharding.steps_sharded(mesh), index)
        last_images = functools.partial(_gather, images, index[-1], mesh)
        yield Call(step, per_call, (resident, rows), last_images)


def _gather(images: Images, index: np.ndarray, mesh: Mesh) -> Array:
    return sharding.to_devices(images[index], mesh)
