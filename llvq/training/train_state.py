"""The state of a training run: one pytree of plain arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx, struct
from jax import numpy as jnp
from jaxtyping import Array, Int

from llvq import quantizers
from llvq.models.vqvae import VQVAE

Tree = dict[str, Any]

# compute_dtype: of the convolutions' arithmetic; and the dtype of all parameters that goes with it.
DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


class TrainState(struct.PyTreeNode):
    """Attributes:
    step: how many batches have been trained on.
    params: what gradients train, nested dicts of arrays.
    statistics: what is learnt without gradients (the EMA codebook), likewise.
    opt_state: Adam's.
    """

    step: Int[Array, ""]
    params: Tree
    statistics: Tree
    opt_state: optax.OptState


def create_model(
    model: Mapping[str, Any],
    quantizer: Mapping[str, Any],
    compute_dtype: str,
    seed: int,
) -> VQVAE:
    """A freshly initialised model.

    Args:
      model: a config's `model` section.
      quantizer: a config's `quantizer` section: its name and options.
      compute_dtype: of the convolutions' arithmetic, a key of DTYPES.
      seed: of the initial parameters.
    """
    dtype, param_dtype = DTYPES[compute_dtype]
    image_shape: Sequence[int] = model["image_shape"]
    rngs = nnx.Rngs(seed)
    return VQVAE(
        quantizers.create(
            latent_dim=model["latent_dim"], param_dtype=param_dtype, rngs=rngs, **quantizer
        ),
        image_channels=image_shape[-1],
        hidden_dims=model["hidden_dims"],
        num_residual_blocks=model["num_residual_blocks"],
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def split(model: VQVAE) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    """A model as (graphdef, params, statistics): its structure and two pytrees of plain arrays.

    `nnx.merge(graphdef, params, statistics)` is the model again.
    """
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    return nnx.graphdef(model), nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def abstract_model(
    model: Mapping[str, Any], quantizer: Mapping[str, Any], compute_dtype: str
) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    """(graphdef, params, statistics) as of `split`, with shapes and dtypes in place of arrays.

    Takes no time: nothing is drawn or compiled. For the arguments see `create_model`.
    """
    return split(nnx.eval_shape(lambda: create_model(model, quantizer, compute_dtype, seed=0)))


def create_train_state(
    model: VQVAE, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef[VQVAE], TrainState]:
    """A model's structure and the state of a run that begins with it."""
    graphdef, params, statistics = split(model)
    step = jnp.zeros((), jnp.int32)
    return graphdef, TrainState(step, params, statistics, optimizer.init(params))


def num_quantizer_parameters(state: TrainState) -> int:
    """How many numbers the quantizer has learnt, the EMA codebook's statistics included."""
    return num_parameters([tree.get("quantizer", {}) for tree in (state.params, state.statistics)])


def num_parameters(tree: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
