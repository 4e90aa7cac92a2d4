"""The autoencoder: encoder, quantizer and decoder in one."""

from collections.abc import Sequence

from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from llvq.models import convolution
from llvq.models.decoder import Decoder
from llvq.models.encoder import Encoder
from llvq.quantizers.base import Losses, Quantizer

NUM_RESIDUAL_BLOCKS = 2


class VQVAE(nnx.Module):
    """A vector-quantized autoencoder around any quantizer.

        quantizer = LatticeQuantizer(64, rngs=rngs)
        model = VQVAE(quantizer, image_channels=1, hidden_dims=[64], rngs=rngs)
        codes = model.encode(images)
        images = model.decode(codes)

    Images are float [batch, height, width, channels] in the value range that the model was trained
    with; height and width must be multiples of 2 ** len(hidden_dims).
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        image_channels: int,
        hidden_dims: Sequence[int],
        num_residual_blocks: int = NUM_RESIDUAL_BLOCKS,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Args:
        quantizer: what lies between encoder and decoder; its latent_dim is the network's.
        image_channels: of the images, 1 or 3 as a rule.
        hidden_dims: the width of the network after each halving of the image.
        num_residual_blocks: in the encoder, and as many in the decoder.
        dtype: of the convolutions' arithmetic.
        param_dtype: of the convolutions' parameters.
        rngs: where initial values are drawn from (stream `params`).
        """
        self.encoder = Encoder(
            image_channels,
            hidden_dims,
            quantizer.latent_dim,
            num_residual_blocks,
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
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
        packing: int | None = None,
    ) -> tuple[Float[Array, "batch height width channels"], Int[Array, "batch h w ..."], Losses]:
        """(reconstructions, codes, quantizer losses); see `Quantizer` for codes, train and mask.

        `packing` is for speed: as `pack` returned it with the images. Then reconstructions come
        packed, too (see `unpack`), and codes as [batch, h / packing, w / packing, packing², ...].
        """
        latents = self.encoder(images, packing)
        quantized, codes, losses = self.quantizer(
            self._vectors(latents, packing), train=train, mask=mask
        )
        return self.decoder(quantized.reshape(latents.shape), packing), codes, losses

    def encode(
        self, images: Float[Array, "batch height width channels"], packing: int | None = None
    ) -> Int[Array, "batch h w ..."]:
        """The codes of images; for `packing` see `__call__`."""
        return self.quantizer(self._vectors(self.encoder(images, packing), packing))[1]

    def pack(
        self, images: Shaped[Array, "batch height width channels"], mesh: Mesh
    ) -> tuple[Shaped[Array, "batch h w c"], int | None]:
        """Images in the form that is fastest on a mesh, and how that is called.

        Returns:
          (images, packing), where packing is None if they are best left as they are.
        """
        scale = 2 ** len(self.encoder.downsample)
        _, height, width, _ = images.shape
        latent_shape = height // mesh.shape["height"] // scale, width // scale
        features = self.encoder.mix.kernel.shape[-1]
        platform = mesh.devices.flat[0].platform
        packing = convolution.choose_packing(platform, latent_shape, features)
        return images if packing is None else convolution.pack(images, scale * packing), packing

    def unpack(
        self, images: Shaped[Array, "batch h w c"], packing: int | None
    ) -> Shaped[Array, "batch height width channels"]:
        """Images or reconstructions as they were before they were packed."""
        scale = 2 ** len(self.encoder.downsample)
        return images if packing is None else convolution.unpack(images, scale * packing)

    def _vectors(
        self, latents: Float[Array, "batch h w c"], packing: int | None
    ) -> Float[Array, "batch h w ..."]:
        """Latents whose last axis is one vector."""
        if packing is None:
            return latents
        return latents.reshape(*latents.shape[:-1], packing**2, self.quantizer.latent_dim)

    def decode(
        self, codes: Int[Array, "batch h w ..."]
    ) -> Float[Array, "batch height width channels"]:
        """The images of codes."""
        return self.decoder(self.quantizer.lookup(codes))

    def reconstruct(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """The images as they come back through the codes."""
        return self(images)[0]
