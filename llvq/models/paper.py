"""The paper's network: strided convolutions and residual blocks (arXiv 2310.09382).

On a TPU it may compute on packed images (see `packing`), which only this module and `VQVAE` know.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.fields import Integer, Several
from llvq.models import layers, packing

# The widths of the network after each halving of the image, from the first to the last.
HiddenDims = Annotated[Sequence[int], Several(Integer(1, 2**16))]
Activation = Literal["leaky_relu", "none"]


def paper(
    *,
    image_shape: tuple[int | None, int | None, int],
    latent_dim: int,
    hidden_dims: HiddenDims = (64,),
    num_residual_blocks: Annotated[int, Integer(0, 100)] = 2,
    latent_activation: Activation = "none",
    output_activation: Activation = "none",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> tuple["Encoder", "Decoder"]:
    """Makes the encoder and the decoder.

    Args:
      image_shape: (height, width, channels); height and width may be None, since the network takes
        images of any size that it can halve.
      latent_dim: the number of entries of a latent vector.
      hidden_dims: the width of the network after each halving of the image.
      num_residual_blocks: in the encoder, and as many in the decoder.
      latent_activation: at the end of the encoder: leaky_relu, as in the paper, or none.
      output_activation: at the end of the decoder, likewise.
      dtype: of the convolutions' arithmetic.
      param_dtype: of the parameters.
      rngs: the source of initial values (stream `params`).
    """
    channels = image_shape[-1]
    common: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    sizes: Any = {"hidden_dims": hidden_dims, "num_residual_blocks": num_residual_blocks}
    encoder = Encoder(channels, latent_dim, activation=latent_activation, **sizes, **common)
    decoder = Decoder(latent_dim, channels, activation=output_activation, **sizes, **common)
    return encoder, decoder


class Encoder(nnx.Module):
    """Halves height and width once for each of `hidden_dims`, then refines and projects.

    Every activation is a LeakyReLU of slope 0.01, but for the last.

    Attributes:
      downsampling: the height of an image over that of its latents.
      latent_dim: the number of entries of a latent vector.
      packing: how latents are packed; None if images are not packed. Then the encoder takes packed
        images and returns latents [batch, h / packing, w / packing, packing², latent_dim].
    """

    def __init__(
        self,
        image_channels: int,
        latent_dim: int,
        *,
        hidden_dims: Sequence[int],
        num_residual_blocks: int,
        activation: str,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        common: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = hidden_dims[-1]
        self.downsampling = 2 ** len(hidden_dims)
        self.latent_dim = latent_dim
        self.activation = activation
        self.packing: int | None = None
        self.downsample = nnx.List(
            layers.Conv(
                features_in,
                features_out,
                4,
                strides=2,
                scale=self.downsampling // 2**step,
                **common,
            )
            for step, (features_in, features_out) in enumerate(
                itertools.pairwise((image_channels, *hidden_dims)), start=1
            )
        )
        self.mix = layers.Conv(width, width, 3, **common)
        self.residual_blocks = nnx.List(
            layers.ResidualBlock(width, **common) for _ in range(num_residual_blocks)
        )
        self.project = layers.Conv(width, latent_dim, 1, **common)

    def choose_packing(self, platform: str, latent_shape: tuple[int, int]) -> int | None:
        """Returns how latents are best packed; see `packing.choose`."""
        return packing.choose(platform, latent_shape, self.mix.features)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w ... latent_dim"]:
        """Maps images to latents."""
        x = images
        for downsample in self.downsample:
            x = nnx.leaky_relu(downsample(x))
        x = nnx.leaky_relu(self.mix(x))
        for block in self.residual_blocks:
            x = block(x)
        x = nnx.leaky_relu(x)
        latents = layers.ACTIVATIONS[self.activation](self.project(x))
        if self.packing is None:
            return latents
        return latents.reshape(*latents.shape[:3], self.packing**2, self.latent_dim)


class Decoder(nnx.Module):
    """Refines the latents, then doubles height and width once for each of `hidden_dims`.

    Every activation is a LeakyReLU of slope 0.01, but for the last.

    Attributes:
      packing: as for `Encoder`; the decoder then takes latents in the encoder's order and returns
        packed images.
    """

    def __init__(
        self,
        latent_dim: int,
        image_channels: int,
        *,
        hidden_dims: Sequence[int],
        num_residual_blocks: int,
        activation: str,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        common: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = hidden_dims[-1]
        self.activation = activation
        self.packing: int | None = None
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
        self, quantized: Float[Array, "batch h w ... latent_dim"]
    ) -> Float[Array, "batch height width channels"]:
        """Maps quantized latents to images."""
        x = quantized if self.packing is None else quantized.reshape(*quantized.shape[:3], -1)
        x = nnx.leaky_relu(self.mix(x))
        for block in self.residual_blocks:
            x = block(x)
        x = nnx.leaky_relu(x)
        *hidden, last = self.upsample
        for upsample in hidden:
            x = nnx.leaky_relu(upsample(x))
        return layers.ACTIVATIONS[self.activation](last(x))
