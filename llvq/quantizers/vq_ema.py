"""VQ-EMA: a codebook learnt by exponential moving averages (arXiv 1711.00937, appendix A.1)."""

from typing import Annotated

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.fields import Number
from llvq.quantizers.base import (
    CODEBOOK_SIZE,
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Losses,
)
from llvq.quantizers.codebook import CodebookQuantizer, sums_by_code


class EMAVectorQuantizer(CodebookQuantizer):
    """A codebook in which each vector follows the mean of the latents nearest to it.

    Attributes:
      num_shares: into how many parts several devices split a batch; see `sums_by_code`.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = CODEBOOK_SIZE,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        decay: Annotated[float, Number(0, 1, excluded=1)] = 0.99,
        epsilon: Annotated[float, Number(0, excluded=0)] = 1e-5,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.latent_dim = latent_dim
        self.commitment_cost = commitment_cost
        self.decay = decay
        self.epsilon = epsilon
        self.param_dtype = param_dtype
        self.num_shares = 1
        shape = (codebook_size, latent_dim)
        self.codebook = nnx.BatchStat(jax.random.normal(rngs.params(), shape, param_dtype))
        self.ema_sum = nnx.BatchStat(jax.random.normal(rngs.params(), shape, param_dtype))
        self.cluster_size = nnx.BatchStat(jnp.zeros(codebook_size, param_dtype))

    def losses(self, codebook_loss: Float[Array, ""], commitment_loss: Float[Array, ""]) -> Losses:
        del codebook_loss  # the moving averages stand in for it
        return {
            "quantizer_loss": self.commitment_cost * commitment_loss,
            "commitment_loss": commitment_loss,
        }

    def update_statistics(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        codes: Int[Array, "batch ..."],
        mask: Bool[Array, "batch"] | None,
    ) -> None:
        codebook_size = self.codebook[...].shape[0]
        # The last column counts the latents.
        values = jnp.append(latents, jnp.ones_like(latents[..., :1]), axis=-1)
        if mask is not None:
            values *= mask.reshape(-1, *[1] * (values.ndim - 1))
        sums = sums_by_code(codes, values, codebook_size, self.num_shares)
        sums, counts = sums[:, :-1], sums[:, -1]

        size = self.decay * self.cluster_size[...] + (1.0 - self.decay) * counts
        total = jnp.sum(size)
        # Laplace smoothing: no cluster is ever empty.
        size = (size + self.epsilon) / (total + codebook_size * self.epsilon) * total
        self.cluster_size[...] = size
        self.ema_sum[...] = self.decay * self.ema_sum[...] + (1.0 - self.decay) * sums
        self.codebook[...] = self.ema_sum[...] / size[:, None]
