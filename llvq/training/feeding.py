"""What training feeds to the devices: for each call of the compiled program one batch, or several.

Where a step takes an accelerator less time than a call takes the host, a call takes several steps,
on images that the devices hold.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import TraceAnnotation
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from llvq.config import INTERVALS, Config
from llvq.data import Dataset, Images
from llvq.data.order import IndexBatch
from llvq.runtime import sharding

# In a loop XLA's convolutions on a CPU do without Eigen, and are slower by far.
_ONE_STEP_A_CALL = ("cpu",)


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


def steps_per_call(config: Config, steps: Iterable[int], mesh: Mesh) -> int:
    """How many steps each call takes, for nothing to follow any of them but its last.

    Args:
      config: of whose `steps_per_call` it is the largest divisor that fits; on a CPU it is 1.
      steps: those after which something follows, besides what the config's intervals say.
      mesh: the devices.
    """
    if mesh.devices.flat[0].platform in _ONE_STEP_A_CALL:
        return 1
    return math.gcd(config["steps_per_call"], *(config[name] for name in INTERVALS), *steps)


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
    # Not `replicate`: that would gather what each process has to see that it is the same.
    resident = jax.make_array_from_process_local_data(sharding.replicated(mesh), images)
    for step in range(first_step + per_call, num_steps + 1, per_call):
        batches = itertools.islice(index_batches, per_call)
        index = np.stack([batch.index for batch in batches]).astype(np.int32)
        with TraceAnnotation("to_devices"):
            rows = jax.make_array_from_process_local_data(sharding.steps_sharded(mesh), index)

        def last_images(index: np.ndarray = index[-1]) -> Array:
            return sharding.to_devices(images[index], mesh)

        yield Call(step, (resident, rows), last_images)
