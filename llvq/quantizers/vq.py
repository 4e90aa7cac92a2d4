"""VQ: a codebook learnt by gradient descent (van den Oord et al. 2017, arXiv 1711.00937)."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llvq.quantizers.base import CODEBOOK_SIZE, COMMITMENT_COST, Losses, Quantizer


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


class VectorQuantizer(Quantizer):
    """Replaces each latent by its nearest codebook vector.

    Codes are indices into the codebook, one for each latent vector: int32 [batch, ...].
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: int = CODEBOOK_SIZE,
        commitment_cost: float = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.latent_dim = latent_dim
        self.code_width = 1
        self.commitment_cost = commitment_cost
        self.param_dtype = param_dtype
        bound = 1.0 / codebook_size
        self.codebook = nnx.Param(
            jax.random.uniform(
                rngs.params(), (codebook_size, latent_dim), param_dtype, -bound, bound
            )
        )

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        codes = nearest(latents, jax.lax.stop_gradient(self.codebook[...]))
        return self.lookup(codes), codes

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        return jnp.take(self.codebook[...], codes, axis=0)

    def losses(self, codebook_loss: Float[Array, ""], commitment_loss: Float[Array, ""]) -> Losses:
        return {
            "quantizer_loss": codebook_loss + self.commitment_cost * commitment_loss,
            "codebook_loss": codebook_loss,
            "commitment_loss": commitment_loss,
        }

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        return {"codebook_usage": codes}
