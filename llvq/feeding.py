"""What training feeds to the devices: for each call of the compiled program one batch, or several.

Where a step takes an accelerator less time than a call takes the host, a call takes several steps,
on images that the devices hold.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import TraceAnnotation
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from llvq import sharding
from llvq.configuration import Config
from llvq.data import Dataset, Images
from llvq.order import IndexBatch


class Call(NamedTuple):
    """Attributes:
    last_step: the number of its last step, counted from 1.
    inputs: what the program takes besides the state: (images,), or (all images, index) of which
      index has a row for each step (see `train_step`).
    last_images: gives the images of the last step, on the devices.
    """

    last_step: int
    inputs: tuple[Array, ...]
    last_images: Callable[[], UInt8[Array, "batch height width channels"]]


def steps_per_call(config: Config, mesh: Mesh) -> int:
    """How many steps a call takes: the config's `steps_per_call`, 1 on a CPU.

    In a loop XLA runs a CPU's convolutions on one thread, without Eigen: 90 times slower.
    """
    return 1 if mesh.devices.flat[0].platform == "cpu" else config["steps_per_call"]


def one_by_one(
    data: Dataset, index_batches: Iterator[IndexBatch], first_step: int, num_steps: int, mesh: Mesh
) -> Iterator[Call]:
    """A call for each step after `first_step`, up to `num_steps`."""
    steps = range(first_step + 1, num_steps + 1)
    batches = data.batches("train", index_batches)
    for step, (_, local_images) in zip(steps, batches, strict=False):
        with TraceAnnotation("to_devices"):
            images = sharding.to_devices(local_images, mesh)

        def last_images(images: Array = images) -> Array:
            return images

        yield Call(step, (images,), last_images)


def several(
    images: Images,
    index_batches: Iterator[IndexBatch],
    first_step: int,
    num_steps: int,
    mesh: Mesh,
    *,
    per_call: int,
    is_event: Callable[[int], bool],
) -> Iterator[Call]:
    """Calls of `per_call` steps, or of one where an event comes before the last of so many.

    Which steps make a call depends on the step it begins with, not on where a run was resumed.

    Args:
      images: the training split, not mirrored; every device gets all of it.
      index_batches: of the steps after `first_step`.
      first_step: how many steps are done.
      num_steps: how many there are to be.
      mesh: the devices.
      per_call: how many steps a call takes.
      is_event: whether something has to be done after a step, by its number; so after the last.
    """
    resident = sharding.replicate(images, mesh)
    step = first_step
    while step < num_steps:
        has_event = any(map(is_event, range(step + 1, step + per_call)))
        batches = list(itertools.islice(index_batches, 1 if has_event else per_call))
        step += len(batches)
        index = np.stack([batch.index for batch in batches]).astype(np.int32)
        with TraceAnnotation("to_devices"):
            rows = jax.make_array_from_process_local_data(sharding.steps_sharded(mesh), index)

        def last_images(index: np.ndarray = index[-1]) -> Array:
            return sharding.to_devices(images[index], mesh)

        yield Call(step, (resident, rows), last_images)
