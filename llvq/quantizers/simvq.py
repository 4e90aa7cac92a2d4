"""SimVQ: a frozen codebook seen through a learned matrix (Zhu et al. 2024, arXiv 2411.02038)."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.quantizers.base import COMMITMENT_COST, CodebookSize, CommitmentCost, Frozen
from llvq.quantizers.codebook import CodebookQuantizer

_PRECISION = jax.lax.Precision.HIGHEST


class SimVQ(CodebookQuantizer):
    """A codebook C·W of random coefficients C, which stay as they are, and a learned matrix W.

    Each step moves all vectors, so that none is left behind. C is normal with variance
    1/latent_dim; W starts uniform in ±1/√latent_dim, as PyTorch's linear layers do.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = 1024,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.latent_dim = latent_dim
        self.levels = (codebook_size,)
        self.commitment_cost = commitment_cost
        self.param_dtype = param_dtype
        bound = latent_dim**-0.5
        shape = (codebook_size, latent_dim)
        self.coefficients = Frozen(bound * jax.random.normal(rngs.params(), shape, param_dtype))
        self.basis = nnx.Param(
            jax.random.uniform(rngs.params(), (latent_dim,) * 2, param_dtype, -bound, bound)
        )

    def points(self) -> Float[Array, "codes latent_dim"]:
        return jnp.matmul(self.coefficients[...], self.basis[...], precision=_PRECISION)
