"""VQ: a codebook learned by gradient descent (van den Oord et al. 2017, arXiv 1711.00937)."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.quantizers.base import (
    CODEBOOK_SIZE,
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Statistic,
    by_example,
)
from llvq.quantizers.codebook import (
    Distance,
    Gradient,
    Initialization,
    LearnedCodebook,
    RestartThreshold,
)

_DECAY = 0.99  # of the moving averages that say which vectors are dead


class VQ(LearnedCodebook):
    """A codebook that the gradient of its distance to the latents moves."""

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = CODEBOOK_SIZE,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
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
        bound = 1.0 / codebook_size
        self.codebook = nnx.Param(
            jax.random.uniform(
                rngs.params(), (codebook_size, latent_dim), param_dtype, -bound, bound
            )
        )
        self.cluster_size = (
            Statistic(jnp.zeros(codebook_size, param_dtype)) if restart_threshold else None
        )

    def update_statistics(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        codes: Int[Array, "batch ..."],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        if self.cluster_size is None:
            return
        size = self.cluster_size[...]
        weights = 1.0 if mask is None else by_example(mask, codes)
        counts = jnp.zeros_like(size).at[codes].add(weights)  # sums of 1 are exact in any order
        size = _DECAY * size + (1.0 - _DECAY) * counts
        self.cluster_size[...] = size
        self._restart(size, latents, mask, key)
