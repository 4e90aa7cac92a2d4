"""The encoder: images to latents."""

import functools
import itertools
from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import layers


class Encoder(nnx.Module):
    """Halves height and width once for each of `hidden_dims`, then refines and projects.

    Every activation is a LeakyReLU of slope 0.01.

    Attributes:
      latent_activation: what follows the projection, "leaky_relu" or "none".
    """

    def __init__(
        self,
        image_channels: int,
        hidden_dims: Sequence[int],
        latent_dim: int,
        num_residual_blocks: int,
        *,
        latent_activation: str,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(layers.Conv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = hidden_dims[-1]
        self.downsample = nnx.List(
            conv(features_in, features_out, 4, strides=2, scale=2 ** (len(hidden_dims) - step))
            for step, (features_in, features_out) in enumerate(
                itertools.pairwise((image_channels, *hidden_dims)), start=1
            )
        )
        self.mix = conv(width, width, 3)
        self.residual_blocks = nnx.List(
            layers.ResidualBlock(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(num_residual_blocks)
        )
        self.project = conv(width, latent_dim, 1)
        self.latent_activation = layers.check_activation("latent_activation", latent_activation)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w latent_dim"]:
        """The latents of images."""
        x = images
        for downsample in self.downsample:
            x = nnx.leaky_relu(downsample(x))
        x = nnx.leaky_relu(self.mix(x))
        for block in self.residual_blocks:
            x = block(x)
        x = nnx.leaky_relu(x)
        return layers.ACTIVATIONS[self.latent_activation](self.project(x))
