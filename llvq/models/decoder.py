"""The decoder: quantized latents to images."""

from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import layers


class Decoder(nnx.Module):
    """Refines the latents, then doubles height and width once for each of `hidden_dims`.

    Every activation is a LeakyReLU of slope 0.01; the last layer, too, ends in one.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        image_channels: int,
        num_residual_blocks: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width = hidden_dims[-1]
        self.mix = layers.Conv(
            latent_dim, width, 3, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.residual_blocks = nnx.List(
            layers.ResidualBlock(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for _ in range(num_residual_blocks)
        )
        upwards = tuple(reversed(hidden_dims))
        self.upsample = nnx.List(
            layers.ConvTranspose(
                features_in, features_out, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
            for features_in, features_out in zip(
                upwards, (*upwards[1:], image_channels), strict=True
            )
        )

    def __call__(
        self, quantized: Float[Array, "batch h w latent_dim"], packing: int | None = None
    ) -> Float[Array, "batch height width channels"]:
        """The images of latents, packed, if at all, as those of the encoder."""
        x = nnx.leaky_relu(self.mix(quantized, packing))
        for block in self.residual_blocks:
            x = block(x, packing)
        x = nnx.leaky_relu(x)
        scale = 1
        for upsample in self.upsample:
            x = nnx.leaky_relu(upsample(x, packing and scale * packing))
            scale *= 2
        return x
