"""LFQ: the sign of each coordinate is the code (Yu et al. 2023, arXiv 2310.05737)."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.fields import Number, PowerOfTwo
from llvq.quantizers.base import COMMITMENT_COST, CommitmentCost, Metrics, distances
from llvq.quantizers.binary import BinaryQuantizer, entropy_of_mean, mean_entropy

# Up to this codebook size the entropy of the mean goes over all codes.
_MOST_EXACT = 2**12


class LFQ(BinaryQuantizer):
    """Lookup-free quantization: a coordinate becomes 1 if it is positive, else −1.

    A latent has log2(codebook_size) entries. Codes are bits: int32 [batch, ..., log2 K], 0 or 1.
    The quantizer has no parameters. Its entropy loss, E[H(p(c|z))] − H(E[p(c|z)]), makes each
    latent's code certain and spreads a batch over the codes (paper, section 3.1). Up to 2¹² codes
    the second term is exact; beyond, it is the sum of the single bits' entropies.
    """

    scale = 1.0

    def __init__(
        self,
        *,
        codebook_size: Annotated[int, PowerOfTwo(2, 2**30)] = 1024,
        entropy_weight: Annotated[float, Number(0)] = 0.1,
        temperature: Annotated[float, Number(0, excluded=0)] = 0.01,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs  # nothing is drawn
        self._set_up(int(math.log2(codebook_size)))
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.commitment_cost = commitment_cost
        self.param_dtype = param_dtype

    @classmethod
    def fixed_latent_dim(cls, options: Mapping[str, Any]) -> int:
        return int(math.log2(options["codebook_size"]))

    def quantize(
        self, latents: Float[Array, "... num_bits"]
    ) -> tuple[Float[Array, "... num_bits"], Int[Array, "... num_bits"]]:
        codes = (jax.lax.stop_gradient(latents) > 0).astype(jnp.int32)
        return self.lookup(codes), codes

    def losses(
        self,
        latents: Float[Array, "... num_bits"],
        quantized: Float[Array, "... num_bits"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        _, commitment_loss = distances(latents, quantized, where)
        logits = self.logits(latents, self.temperature)
        entropy = mean_entropy(logits, where)
        batch_entropy = entropy_of_mean(logits, where, factorized=2**self.latent_dim > _MOST_EXACT)
        loss = self.commitment_cost * commitment_loss + self.entropy_weight * (
            entropy - batch_entropy
        )
        return loss, {
            "commitment_loss": commitment_loss,
            "entropy": entropy,
            "batch_entropy": batch_entropy,
        }
