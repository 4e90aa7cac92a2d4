"""The autoencoder: encoder, quantizer and decoder in one."""

from collections.abc import Sequence

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped, UInt8

from llvq.models import packing
from llvq.models.decoder import Decoder
from llvq.models.encoder import Encoder
from llvq.quantizers.base import Losses, Quantizer

NUM_RESIDUAL_BLOCKS = 2


class VQVAE(nnx.Module):
    """A vector-quantized autoencoder around any quantizer.

        quantizer = LatticeQuantizer(64, rngs=rngs)
        model = VQVAE(quantizer, image_channels=1, hidden_dims=[64], rngs=rngs)
        codes = model.encode(images)
        images = model.decode(codes)  # floats; model.decode_uint8(codes) for pictures

    Images are [batch, height, width, channels], either uint8 or float in the value range that the
    model is trained with. Height and width must be multiples of 2 ** len(hidden_dims).

    Attributes:
      packing: None, or how latents are packed for speed (see `packing`). Then `__call__` takes
        images as `pack` returns them, and returns reconstructions for `unpack`, and codes as
        [batch, h / packing, w / packing, packing², ...]. To be set for all layers at once:
        `model.set_attributes(packing=…)`.
      code_model: None, or what the model's codes cost (see `llvq.codec`).
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        image_channels: int,
        hidden_dims: Sequence[int],
        num_residual_blocks: int = NUM_RESIDUAL_BLOCKS,
        latent_activation: str = "none",
        output_activation: str = "none",
        value_range: tuple[float, float] | None = (0.0, 1.0),
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Args:
        quantizer: maps latents to codes; its latent_dim is the network's.
        image_channels: of the images, 1 or 3 as a rule.
        hidden_dims: the width of the network after each halving of the image.
        num_residual_blocks: in the encoder, and as many in the decoder.
        latent_activation: at the end of the encoder, "leaky_relu" or "none".
        output_activation: at the end of the decoder, likewise.
        value_range: what 0 … 255 is mapped to; None if that is not known.
        dtype: of the convolutions' arithmetic.
        param_dtype: of the convolutions' parameters.
        rngs: the source of initial values (stream `params`).
        """
        self.encoder = Encoder(
            image_channels,
            hidden_dims,
            quantizer.latent_dim,
            num_residual_blocks,
            latent_activation=latent_activation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.quantizer = quantizer
        self.decoder = Decoder(
            quantizer.latent_dim,
            hidden_dims,
            image_channels,
            num_residual_blocks,
            output_activation=output_activation,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.value_range = value_range
        self.param_dtype = param_dtype
        self.packing: int | None = None
        self.code_model: object | None = None

    def __call__(
        self,
        images: Num[Array, "batch height width channels"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch height width channels"], Int[Array, "batch h w ..."], Losses]:
        """(reconstructions, codes, quantizer losses); see `Quantizer` for all but the images."""
        latents = self._latents(images)
        quantized, codes, losses = self.quantizer(
            self._vectors(latents), train=train, mask=mask, key=key
        )
        return self.decoder(quantized.reshape(latents.shape)), codes, losses

    def encode(
        self, images: Num[Array, "batch height width channels"]
    ) -> Int[Array, "batch h w ..."]:
        """The codes of images."""
        return self.quantizer(self._vectors(self._latents(images)))[1]

    def _latents(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[Array, "batch h w latent_dim"]:
        factor = 2 ** len(self.encoder.downsample)
        if self.packing is None and any(size % factor for size in images.shape[1:3]):
            raise ValueError(
                f"height and width of images must be multiples of {factor}, not "
                f"{list(images.shape[1:3])} (llvq.codec takes any size)"
            )
        return self.encoder(self.to_floats(images))

    def decode(
        self, codes: Int[Array, "batch h w ..."]
    ) -> Float[Array, "batch height width channels"]:
        """The images of codes, in the model's value range or, where the model erred, beyond it."""
        return self.decoder(self.quantizer.lookup(codes))

    def decode_uint8(
        self, codes: Int[Array, "batch h w ..."]
    ) -> UInt8[Array, "batch height width channels"]:
        """The images of codes, clipped to the value range and mapped to 0 … 255."""
        return self.to_uint8(self.decode(codes))

    def reconstruct(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The images as they come back through the codes."""
        return self(images)[0]

    def to_floats(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Maps 0 … 255 of uint8 images linearly to the model's value range; passes floats on.

        Raises:
          ValueError: for other integers, or for uint8 if the model does not know its value range.
        """
        images = jnp.asarray(images)
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images
        if images.dtype != jnp.uint8:
            raise ValueError(f"images must be uint8 or float, not {images.dtype}")
        low, high = self._value_range()
        return low + images.astype(self.param_dtype) / 255.0 * (high - low)

    def to_uint8(
        self, images: Float[Array, "batch height width channels"]
    ) -> UInt8[Array, "batch height width channels"]:
        """Clips images to the model's value range and maps it linearly to 0 … 255."""
        return jnp.round(255.0 * self.to_unit(images.astype(self.param_dtype))).astype(jnp.uint8)

    def to_unit(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Clips images to the model's value range and maps it linearly to [0, 1].

        Raises:
          ValueError: if the model does not know its value range.
        """
        low, high = self._value_range()
        return jnp.clip((images - low) / (high - low), 0.0, 1.0)

    def pack(
        self, images: Shaped[Array, "batch height width channels"]
    ) -> Shaped[Array, "batch h w c"]:
        """Images as `__call__` takes them: packed, if the model has a packing."""
        return images if self.packing is None else packing.pack(images, self._image_packing())

    def unpack(
        self, images: Shaped[Array, "batch h w c"]
    ) -> Shaped[Array, "batch height width channels"]:
        """Images or reconstructions as they were before `pack`."""
        return images if self.packing is None else packing.unpack(images, self._image_packing())

    def unpack_codes(self, codes: Int[Array, "batch h w ..."]) -> Int[Array, "batch h w ..."]:
        """Codes in the order of the latents, where the model has a packing."""
        if self.packing is None:
            return codes
        flat = codes.reshape(*codes.shape[:3], -1)
        unpacked = packing.unpack(flat, self.packing)
        return unpacked.reshape(*unpacked.shape[:3], *codes.shape[4:])

    @property
    def image_channels(self) -> int:
        """How many channels the images have."""
        return self.encoder.downsample[0].kernel.shape[-2]

    def _image_packing(self) -> int:
        assert self.packing is not None
        return self.packing * 2 ** len(self.encoder.downsample)

    def _value_range(self) -> tuple[float, float]:
        if self.value_range is None:
            raise ValueError(
                "the model does not know its value range: give it floats, or set model.value_range"
            )
        return self.value_range

    def _vectors(self, latents: Float[Array, "batch h w c"]) -> Float[Array, "batch h w ..."]:
        """Latents reshaped so that the last axis is one vector."""
        if self.packing is None:
            return latents
        return latents.reshape(*latents.shape[:-1], self.packing**2, self.quantizer.latent_dim)
