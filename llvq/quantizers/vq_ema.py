"""VQ-EMA: a codebook learned by exponential moving averages (arXiv 1711.00937, appendix A.1)."""

from typing import Annotated

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Number
from llvq.quantizers.base import (
    CODEBOOK_SIZE,
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Metrics,
    Statistic,
    distances,
)
from llvq.quantizers.codebook import (
    Distance,
    Gradient,
    Initialization,
    LearnedCodebook,
    RestartThreshold,
    sums_and_counts,
)


class VQEMA(LearnedCodebook):
    """A codebook in which each vector follows the mean of the latents nearest to it."""

    cluster_size: Statistic

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = CODEBOOK_SIZE,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        decay: Annotated[float, Number(0, 1, excluded=1)] = 0.99,
        epsilon: Annotated[float, Number(0, excluded=0)] = 1e-5,
        distance: Distance = "euclidean",
        gradient: Gradient = "straight_through",
        initialization: Initialization = "random",
        restart_threshold: RestartThreshold = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self._set_up(
            latent_dim,
            codebook_size,
            commitment_cost=commitment_cost,
            distance=distance,
            gradient=gradient,
            initialization=initialization,
            restart_threshold=restart_threshold,
            param_dtype=param_dtype,
        )
        self.decay = decay
        self.epsilon = epsilon
        shape = (codebook_size, latent_dim)
        self.codebook = Statistic(jax.random.normal(rngs.params(), shape, param_dtype))
        self.ema_sum = Statistic(jax.random.normal(rngs.params(), shape, param_dtype))
        self.cluster_size = Statistic(jnp.zeros(codebook_size, param_dtype))

    def losses(
        self,
        latents: Float[Array, "... latent_dim"],
        quantized: Float[Array, "... latent_dim"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        # The moving averages stand in for the codebook loss.
        _, commitment_loss = distances(latents, quantized, where)
        return self.commitment_cost * commitment_loss, {"commitment_loss": commitment_loss}

    def _replace(
        self,
        is_new: Bool[Array, "codes"],
        vectors: Float[Array, "codes latent_dim"],
        count: Float[Array, ""],
    ) -> None:
        super()._replace(is_new, vectors, count)
        self.ema_sum[...] = jnp.where(is_new[:, None], count * vectors, self.ema_sum[...])

    def update_statistics(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        codes: Int[Array, "batch ..."],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        codebook_size = len(self.codebook[...])
        sums, counts = sums_and_counts(latents, codes, mask, codebook_size, self.num_shares)
        size = self.decay * self.cluster_size[...] + (1.0 - self.decay) * counts
        total = jnp.sum(size)
        # Laplace smoothing: no cluster is ever empty.
        size = (size + self.epsilon) / (total + codebook_size * self.epsilon) * total
        self.cluster_size[...] = size
        self.ema_sum[...] = self.decay * self.ema_sum[...] + (1.0 - self.decay) * sums
        # Where no latent has ever counted there is no mean.
        means = self.ema_sum[...] / jnp.where(total > 0, size, 1)[:, None]
        self.codebook[...] = jnp.where(total > 0, means, self.codebook[...])
        if self.restart_threshold:
            self._restart(size, latents, mask, key)
