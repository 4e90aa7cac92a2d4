"""The autoencoder: encoder, quantizer and decoder in one."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

from llvq.models import packing
from llvq.quantizers.base import Quantizer

Images = Float[Array, "batch height width channels"]
Mask = Bool[Array, "batch"]


class VQVAEOutput(NamedTuple):
    """Attributes:
    reconstructions: [batch, height, width, channels], in the model's value range or beyond it.
    codes: int32 [batch, h, w, ...].
    loss: the quantizer's loss, to be added to a reconstruction loss.
    metrics: scalars of the quantizer, by name.
    """

    reconstructions: Images
    codes: Int[Array, "batch h w ..."]
    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Images and their reconstructions, in the order of pixels that the network computes in.

    Attributes:
      images: as the model was given them, [batch, height, width, channels].
      targets: the images in the model's value range, [batch, ...].
      reconstructions: likewise, in the same order of pixels.
      codes: int32 [batch, ...], in the network's order as well.
      loss: the quantizer's loss.
      metrics: scalars of the quantizer, by name.
      model: made them.
    """

    images: Num[Array, "batch height width channels"]
    targets: Float[Array, "batch ..."]
    reconstructions: Float[Array, "batch ..."]
    codes: Int[Array, "batch ..."]
    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    model: "VQVAE"

    def plain(self) -> tuple[Images, Images]:
        """Returns (images, reconstructions) as [batch, height, width, channels]."""
        # A TPU would otherwise unpack images that it has just packed.
        images = self.model.to_floats(self.images)
        return images, self.model.in_plain_order(self.reconstructions).astype(images.dtype)

    def unit(self) -> tuple[Images, Images]:
        """Returns `plain`, with the model's value range mapped to [0, 1]; nothing is clipped."""
        low, high = self.model.value_range
        images, reconstructions = ((x - low) / (high - low) for x in self.plain())
        return images, reconstructions


class VQVAE(nnx.Module):
    """A vector-quantized autoencoder of any encoder, quantizer and decoder.

        encoder, decoder = NETWORKS["paper"](image_shape=(28, 28, 1), latent_dim=64, rngs=rngs)
        model = VQVAE(encoder, SparseLattice(64, rngs=rngs), decoder, value_range=(-0.5, 0.5))
        codes = model.encode(images)
        images = model.decode(codes)  # floats; model.decode_uint8(codes) for pictures

    `encoder(images)` are latents [batch, h, w, latent_dim], and `encoder.downsampling` is the
    height of an image over that of its latents. `decoder` maps such latents to images. Images are
    [batch, height, width, channels], either uint8 or float in the model's value range; height and
    width must be multiples of `downsampling`.

    An encoder may have an attribute `packing` (see `models.packing`): encoder and decoder then
    compute on packed images. Only this class knows of it: images, latents and codes have their
    plain shapes in all methods but `pair`.
    """

    def __init__(
        self,
        encoder: Any,
        quantizer: Quantizer,
        decoder: Any,
        *,
        value_range: tuple[float, float],
        image_channels: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        """Args:
          encoder: maps images to latents.
          quantizer: maps latents to codes.
          decoder: maps quantized latents to images.
          value_range: what the pixel values 0 … 255 are mapped to.
          image_channels: of the images; None if it does not matter.
          param_dtype: of images that were uint8.

        Raises:
          ValueError: if the encoder's latents are not the quantizer's.
        """
        if encoder.latent_dim != quantizer.latent_dim:
            raise ValueError(
                f"the encoder's latent_dim={encoder.latent_dim} is not the quantizer's, "
                f"{quantizer.latent_dim}"
            )
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.value_range = value_range
        self.image_channels = image_channels
        self.param_dtype = param_dtype

    @property
    def downsampling(self) -> int:
        """The height of an image over that of its latents."""
        return self.encoder.downsampling

    def __call__(
        self,
        images: Num[Array, "batch height width channels"],
        *,
        train: bool = False,
        mask: Mask | None = None,
        key: Key[Array, ""] | None = None,
    ) -> VQVAEOutput:
        """Reconstructs images; see `Quantizer.__call__` for all arguments but the images."""
        pair = self.pair(images, train=train, mask=mask, key=key)
        reconstructions = self.in_plain_order(pair.reconstructions)
        codes = self._codes_in_plain_order(pair.codes)
        return VQVAEOutput(reconstructions, codes, pair.loss, pair.metrics)

    def pair(
        self,
        images: Num[Array, "batch height width channels"],
        *,
        train: bool = False,
        mask: Mask | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Pair:
        """Reconstructs images, and leaves pixels in the order in which the network computes."""
        packed = self._in_order_of_network(images)
        targets = self.to_floats(packed)
        quantized, codes, loss, metrics = self.quantizer(
            self.encoder(targets), train=train, mask=mask, key=key
        )
        reconstructions = self.decoder(quantized).astype(targets.dtype)
        return Pair(images, targets, reconstructions, codes, loss, metrics, self)

    def encode(
        self, images: Num[Array, "batch height width channels"]
    ) -> Int[Array, "batch h w ..."]:
        """Encodes images."""
        latents = self.encoder(self.to_floats(self._in_order_of_network(images)))
        return self._codes_in_plain_order(self.quantizer(latents).codes)

    def decode(self, codes: Int[Array, "batch h w ..."]) -> Images:
        """Decodes codes, to images in the model's value range or, where it erred, beyond it."""
        latents = self.quantizer.lookup(codes)
        if self._packing is not None:
            latents = packing.pack_vectors(latents, self._packing)
        return self.in_plain_order(self.decoder(latents))

    def decode_uint8(
        self, codes: Int[Array, "batch h w ..."]
    ) -> UInt8[Array, "batch height width channels"]:
        """Decodes codes, to images clipped to the value range and mapped to 0 … 255."""
        return self.to_uint8(self.decode(codes))

    def reconstruct(self, images: Num[Array, "batch height width channels"]) -> Images:
        """Returns the images as they come back through the codes."""
        return self(images).reconstructions

    def to_floats(self, images: Num[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Maps 0 … 255 of uint8 images linearly to the model's value range; passes floats on.

        Raises:
          ValueError: for other integers.
        """
        images = jnp.asarray(images)
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images
        if images.dtype != jnp.uint8:
            raise ValueError(f"images must be uint8 or float, not {images.dtype}")
        low, high = self.value_range
        return low + images.astype(self.param_dtype) / 255.0 * (high - low)

    def to_uint8(self, images: Images) -> UInt8[Array, "batch height width channels"]:
        """Clips images to the model's value range and maps it linearly to 0 … 255."""
        return jnp.round(255.0 * self.to_unit(images.astype(self.param_dtype))).astype(jnp.uint8)

    def to_unit(self, images: Images) -> Images:
        """Clips images to the model's value range and maps it linearly to [0, 1]."""
        low, high = self.value_range
        return jnp.clip((images - low) / (high - low), 0.0, 1.0)

    def in_plain_order(self, images: Float[Array, "batch ..."]) -> Images:
        """Maps images in the network's order to [batch, height, width, channels]."""
        if self._packing is None:
            return images
        return packing.unpack(images, self._packing * self.downsampling)

    def _in_order_of_network(
        self, images: Num[Array, "batch height width channels"]
    ) -> Num[Array, "batch ..."]:
        images = jnp.asarray(images)
        if any(size % self.downsampling for size in images.shape[1:3]):
            raise ValueError(
                f"height and width of images must be multiples of {self.downsampling}, not "
                f"{list(images.shape[1:3])} (llvq.Codec takes any size)"
            )
        if self._packing is None:
            return images
        return packing.pack(images, self._packing * self.downsampling)

    def _codes_in_plain_order(self, codes: Int[Array, "batch ..."]) -> Int[Array, "batch h w ..."]:
        return codes if self._packing is None else packing.unpack_vectors(codes, self._packing)

    @property
    def _packing(self) -> int | None:
        return getattr(self.encoder, "packing", None)
