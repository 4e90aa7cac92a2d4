"""The state of a training run: one pytree of plain arrays."""

from typing import Any

import jax
import optax
from flax import nnx, struct
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from llvq import quantizers
from llvq.config import DTYPES, Architecture
from llvq.models import VQVAE, packing
from llvq.training import streams

Tree = dict[str, Any]

OPTIMIZER = optax.scale_by_adam()  # Adam but for the learning rate, which each step computes


class TrainState(struct.PyTreeNode):
    """Attributes:
    step: how many batches have been trained on.
    params: nested dicts of arrays that gradients train.
    statistics: nested dicts of arrays that are learned without gradients (the EMA codebook).
    opt_state: Adam's moments.
    """

    step: Int[Array, ""]
    params: Tree
    statistics: Tree
    opt_state: optax.OptState


def create_model(architecture: Architecture, seed: int) -> VQVAE:
    """A freshly initialised model.

    Args:
      architecture: network, quantizer and dtypes.
      seed: of the initial parameters.
    """
    model, quantizer, compute_dtype = architecture
    dtype, param_dtype = DTYPES[compute_dtype]
    of_network, of_quantizer = (
        nnx.Rngs(params=streams.key(seed, stream))
        for stream in (streams.NETWORK, streams.QUANTIZER)
    )
    return VQVAE(
        quantizers.create(
            quantizer.name,
            model.latent_dim,
            param_dtype=param_dtype,
            rngs=of_quantizer,
            **quantizer.options,
        ),
        image_channels=model.image_shape[-1],
        hidden_dims=model.hidden_dims,
        num_residual_blocks=model.num_residual_blocks,
        latent_activation=model.latent_activation,
        output_activation=model.output_activation,
        value_range=model.value_range,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=of_network,
    )


def abstract_model(architecture: Architecture) -> VQVAE:
    """A model with shapes and dtypes in place of arrays: nothing is drawn or compiled."""
    return nnx.eval_shape(lambda: create_model(architecture, seed=0))


def fit_to_mesh(model: VQVAE, mesh: Mesh, latent_shape: tuple[int, int]) -> None:
    """Sets what depends on the devices that a model will run on.

    Args:
      model: is changed.
      mesh: the devices.
      latent_shape: (height, width) of an image's latents.
    """
    height, width = latent_shape
    features = model.encoder.mix.kernel.shape[-1]
    platform = mesh.devices.flat[0].platform
    share = height // mesh.shape["height"], width
    model.set_attributes(packing=packing.choose(platform, share, features))
    model.set_attributes(num_shares=mesh.shape["data"], raise_if_not_found=False)


def split(model: VQVAE) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    """A model as (graphdef, params, statistics): its structure and two pytrees of plain arrays.

    `nnx.merge(graphdef, params, statistics)` is the model again.
    """
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    return nnx.graphdef(model), nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def create_train_state(model: VQVAE) -> TrainState:
    """The state of a run that begins with a model."""
    _, params, statistics = split(model)
    return TrainState(jnp.zeros((), jnp.int32), params, statistics, OPTIMIZER.init(params))


def abstract_train_state(model: VQVAE) -> TrainState:
    """The same with shapes and dtypes in place of arrays."""
    return jax.eval_shape(lambda: create_train_state(model))


def num_quantizer_parameters(state: TrainState) -> int:
    """How many numbers the quantizer holds, statistics and frozen coefficients included."""
    return num_parameters([tree.get("quantizer", {}) for tree in (state.params, state.statistics)])


def num_parameters(tree: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
