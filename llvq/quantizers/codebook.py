"""What VQ and VQ-EMA share: a codebook, and the search for the vector nearest to a latent."""

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from llvq.quantizers.base import Quantizer


def nearest(
    latents: Float[Array, "... latent_dim"], codebook: Float[Array, "codes latent_dim"]
) -> Int[Array, "..."]:
    """The index of the codebook vector nearest to each latent, the lowest one on ties.

    By ‖z‖² + ‖e‖² − 2z·e, all three terms: ‖z‖² is the same for every e, but the rounding that it
    brings decides between the many near-zero vectors of a codebook that EMA has let die.
    """
    products = jnp.einsum("...d,kd->...k", latents, codebook, precision=jax.lax.Precision.HIGHEST)
    latent_norms = jnp.sum(latents**2, axis=-1, keepdims=True)
    distances = latent_norms + jnp.sum(codebook**2, axis=-1) - 2.0 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


class CodebookQuantizer(Quantizer):
    """Replaces each latent by its nearest codebook vector.

    Codes are indices into the codebook, one for each latent vector: int32 [batch, ...].
    """

    code_width = 1
    codebook: nnx.Variable[Array]  # [codebook_size, latent_dim]

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        codes = nearest(latents, jax.lax.stop_gradient(self.codebook[...]))
        return self.lookup(codes), codes

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        return jnp.take(self.codebook[...], codes, axis=0)

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        return {"codebook_usage": codes}
