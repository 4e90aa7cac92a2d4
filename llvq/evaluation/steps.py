"""The jitted steps of evaluation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from llvq.evaluation import metrics
from llvq.models import VQVAE
from llvq.runtime import sharding
from llvq.training.objective import Objective
from llvq.training.train_state import TrainState
from llvq.usage.counting import CodeCounts, count_codes

Images = UInt8[Array, "batch height width channels"]
Mask = Bool[Array, "batch"]
Levels = Int32[Array, "devices"]


class Steps(NamedTuple):
    """Functions of (state, images, …), on the devices of a mesh.

    Attributes:
      measure: (state, images, mask, levels) to (sums of metrics and losses, codes counted); see
        `count_codes` for the levels.
      preview: (state, images) to (originals and reconstructions in [0, 1], histogram
        data), replicated.
    """

    measure: Callable[
        [TrainState, Images, Mask, Levels], tuple[dict[str, Float[Array, ""]], CodeCounts]
    ]
    preview: Callable[
        [TrainState, Images], tuple[Float[Array, "..."], Float[Array, "..."], dict[str, Array]]
    ]


def measure_images(
    model: VQVAE, objective: Objective, images: Images, mask: Mask
) -> tuple[dict[str, Float[Array, ""]], Int[Array, "batch ..."]]:
    """Sums metrics and losses over the images that count; also returns the codes of all."""
    _, means, pair = objective(model, images, mask=mask)
    count = mask.sum()
    losses = {name: mean * count for name, mean in means.items()}
    return losses | metrics.sums(pair, mask), pair.codes


def make_steps(graphdef: nnx.GraphDef[VQVAE], objective: Objective, mesh: Mesh) -> Steps:
    """Makes the steps of a model.

    Args:
      graphdef: the model's structure (see `factory.split`), fitted to the mesh.
      objective: what is minimised in training.
      mesh: the devices.
    """

    def load(state: TrainState) -> VQVAE:
        return nnx.merge(graphdef, state.best_params, state.statistics)

    def metrics_step(
        state: TrainState, images: Images, mask: Mask, levels: Levels
    ) -> tuple[dict[str, Float[Array, ""]], CodeCounts]:
        model = load(state)
        sums, codes = measure_images(model, objective, images, mask)
        width = model.quantizer.code_width
        return sums, count_codes(codes, mask, levels, code_width=width, mesh=mesh)

    def preview_step(
        state: TrainState, images: Images
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], dict[str, Array]]:
        model = load(state)
        pair = model.pair(images)
        return *pair.unit(), model.quantizer.histograms(pair.codes)

    whole, by_device = sharding.replicated(mesh), sharding.device_sharded(mesh)
    jit = functools.partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    batch = (whole, sharding.images_sharded(mesh), sharding.batch_sharded(mesh), by_device)
    return Steps(
        measure=jit(metrics_step, in_shardings=batch, out_shardings=(whole, by_device)),
        preview=jit(preview_step, in_shardings=(whole, whole), out_shardings=whole),
    )
