"""Models from names and options, fresh or without arrays, and their split into pytrees."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llvq.errors import UserError
from llvq.models import streams
from llvq.models.registry import NETWORKS
from llvq.models.vqvae import VQVAE
from llvq.quantizers import registry as quantizers

Tree = dict[str, Any]

# compute_dtype: the dtype of the network's arithmetic, and that of all parameters with it.
DTYPES: dict[str, tuple[DTypeLike, DTypeLike]] = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


class Architecture(NamedTuple):
    """All that a model is made from; names and options are checked already.

    Attributes:
      network: of `NETWORKS`.
      network_options: all of its options.
      quantizer: of `QUANTIZERS`.
      quantizer_options: all of its options.
      image_shape: (height, width, channels); height and width are 0 where they do not matter.
      latent_dim: the number of entries of a latent vector.
      value_range: what pixel values 0 … 255 are mapped to.
      compute_dtype: of `DTYPES`.
    """

    network: str
    network_options: Mapping[str, Any]
    quantizer: str
    quantizer_options: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    latent_dim: int
    value_range: tuple[float, float]
    compute_dtype: str


def require_x64(compute_dtype: str) -> None:
    """Raises UserError if JAX would take float32 instead of float64."""
    if compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("config.compute_dtype=float64: needs jax_enable_x64 (JAX_ENABLE_X64=1)")


def create_model(architecture: Architecture, seed: int) -> VQVAE:
    """Makes a freshly initialised model.

    Args:
      architecture: of the model.
      seed: of the initial parameters; network and quantizer draw from streams of their own.
    """
    dtype, param_dtype = DTYPES[architecture.compute_dtype]
    height, width, channels = architecture.image_shape
    encoder, decoder = NETWORKS[architecture.network](
        image_shape=(height or None, width or None, channels),
        latent_dim=architecture.latent_dim,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(params=streams.key(seed, streams.NETWORK)),
        **architecture.network_options,
    )
    quantizer = quantizers.create(
        architecture.quantizer,
        architecture.latent_dim,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(params=streams.key(seed, streams.QUANTIZER)),
        **architecture.quantizer_options,
    )
    return VQVAE(
        encoder,
        quantizer,
        decoder,
        value_range=architecture.value_range,
        image_channels=channels,
        param_dtype=param_dtype,
    )


def abstract_model(architecture: Architecture) -> VQVAE:
    """Makes a model with shapes and dtypes in place of arrays: nothing is drawn or compiled."""
    return nnx.eval_shape(lambda: create_model(architecture, seed=0))


def latent_shape(model: VQVAE, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (height, width) of an image's latents; an image is padded if need be."""
    height, width = (-(-size // model.downsampling) for size in image_shape[:2])
    return height, width


def fit_to_mesh(model: VQVAE, mesh: Mesh, image_shape: tuple[int, ...]) -> None:
    """Sets what depends on the devices that a model will run on.

    Args:
      model: is changed.
      mesh: the devices.
      image_shape: (height, width, channels) of the images.
    """
    height, width = latent_shape(model, image_shape)
    if choose_packing := getattr(model.encoder, "choose_packing", None):
        platform = mesh.devices.flat[0].platform
        packing = choose_packing(platform, (height // mesh.shape["height"], width))
        model.set_attributes(packing=packing)
    model.set_attributes(num_shares=mesh.shape["data"], raise_if_not_found=False)


def split(model: VQVAE) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    """Splits a model into (graphdef, params, statistics): its structure and two pytrees of arrays.

    `nnx.merge(graphdef, params, statistics)` is the model again.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, statistics = map(nnx.to_pure_dict, states)
    return graphdef, params, statistics


def num_parameters(tree: Any) -> int:
    """Counts the numbers that a pytree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
