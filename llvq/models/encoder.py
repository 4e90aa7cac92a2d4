"""The encoder: images to latents."""

import functools
from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import layers


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
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(layers.Conv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width = hidden_dims[-1]
        self.downsample = nnx.List(
            conv(features_in, features_out, 4, strides=2)
            for features_in, features_out in zip(
                (image_channels, *hidden_dims[:-1]), hidden_dims, strict=True
            )
        )
        self.mix = conv(width, width, 3)
        self.residual_blocks = nnx.List(
            layers.ResidualBlock(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(num_residual_blocks)
        )
        self.project = conv(width, latent_dim, 1)

    def __call__(
        self, images: Float[Array, "batch height width channels"], packing: int | None = None
    ) -> Float[Array, "batch h w latent_dim"]:
        """The latents of images.

        Packed (see `convolution`), if at all, the latents by `packing`, the images by that times
        2 ** len(hidden_dims).
        """
        x, scale = images, 2 ** len(self.downsample)
        for downsample in self.downsample:
            scale //= 2
            x = nnx.leaky_relu(downsample(x, packing and scale * packing))
        x = nnx.leaky_relu(self.mix(x, packing))
        for block in self.residual_blocks:
            x = block(x, packing)
        x = nnx.leaky_relu(x)
        return nnx.leaky_relu(self.project(x, packing))
