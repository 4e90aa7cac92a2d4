"""The encoder: images to latents."""

from collections.abc import Sequence

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from llvq.layers import ResidualBlock, conv


class Encoder(nnx.Module):
    """Halves height and width once for each of `hidden_dims`, then refines and projects.

    Every activation is a LeakyReLU of slope 0.01, the one after the projection included.
    """

    def __init__(
        self,
        image_channels: int,
        hidden_dims: Sequence[int],
        latent_dim: int,
        num_residual_blocks: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = hidden_dims[-1]
        self.downsample = nnx.List(
            conv(features_in, features_out, 4, strides=2, **kinds)
            for features_in, features_out in zip(
                (image_channels, *hidden_dims[:-1]), hidden_dims, strict=True
            )
        )
        self.mix = conv(width, width, 3, **kinds)
        self.residual_blocks = nnx.List(
            ResidualBlock(width, **kinds) for _ in range(num_residual_blocks)
        )
        self.project = conv(width, latent_dim, 1, **kinds)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w latent_dim"]:
        x = images
        for downsample in self.downsample:
            x = nnx.leaky_relu(downsample(x))
        x = nnx.leaky_relu(self.mix(x))
        for block in self.residual_blocks:
            x = block(x)
        x = nnx.leaky_relu(x)
        return nnx.leaky_relu(self.project(x))
