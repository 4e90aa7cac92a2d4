"""The decoder: quantized latents to images."""

import itertools
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import layers


class Decoder(nnx.Module):
    """Refines the latents, then doubles height and width once for each of `hidden_dims`.

    Every activation is a LeakyReLU of slope 0.01.

    Attributes:
      output_activation: what follows the last layer, "leaky_relu" or "none".
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        image_channels: int,
        num_residual_blocks: int,
        *,
        output_activation: str,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.output_activation = layers.check_activation("output_activation", output_activation)
        width = hidden_dims[-1]
        common: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.mix = layers.Conv(latent_dim, width, 3, **common)
        self.residual_blocks = nnx.List(
            layers.ResidualBlock(width, **common) for _ in range(num_residual_blocks)
        )
        self.upsample = nnx.List(
            layers.ConvTranspose(features_in, features_out, scale=2**step, **common)
            for step, (features_in, features_out) in enumerate(
                itertools.pairwise((*reversed(hidden_dims), image_channels))
            )
        )

    def __call__(
        self, quantized: Float[Array, "batch h w latent_dim"]
    ) -> Float[Array, "batch height width channels"]:
        """The images of quantized latents."""
        x = nnx.leaky_relu(self.mix(quantized))
        for block in self.residual_blocks:
            x = block(x)
        x = nnx.leaky_relu(x)
        *hidden, last = self.upsample
        for upsample in hidden:
            x = nnx.leaky_relu(upsample(x))
        return layers.ACTIVATIONS[self.output_activation](last(x))
