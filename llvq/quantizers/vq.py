"""VQ: a codebook learnt by gradient descent (van den Oord et al. 2017, arXiv 1711.00937)."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.quantizers.base import (
    CODEBOOK_SIZE,
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Losses,
)
from llvq.quantizers.codebook import CodebookQuantizer


class VectorQuantizer(CodebookQuantizer):
    """A codebook that the gradient of its distance to the latents moves."""

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = CODEBOOK_SIZE,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.latent_dim = latent_dim
        self.commitment_cost = commitment_cost
        self.param_dtype = param_dtype
        bound = 1.0 / codebook_size
        self.codebook = nnx.Param(
            jax.random.uniform(
                rngs.params(), (codebook_size, latent_dim), param_dtype, -bound, bound
            )
        )

    def losses(self, codebook_loss: Float[Array, ""], commitment_loss: Float[Array, ""]) -> Losses:
        return {
            "quantizer_loss": codebook_loss + self.commitment_cost * commitment_loss,
            "codebook_loss": codebook_loss,
            "commitment_loss": commitment_loss,
        }
