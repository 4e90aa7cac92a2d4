"""BSQ: the signs of a latent on the unit sphere (Zhao et al. 2024, arXiv 2406.07548)."""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.fields import Integer, Number
from llvq.quantizers.base import Metrics
from llvq.quantizers.binary import BinaryQuantizer, entropy_of_mean, mean_entropy
from llvq.quantizers.codebook import normalize


class BSQ(BinaryQuantizer):
    """Binary spherical quantization: normalizes a latent, then maps each coordinate to ±1/√L.

    A latent has L = num_bits entries. Codes are bits: int32 [batch, ..., num_bits], 0 or 1. The
    quantizer has no parameters. The entropy loss E[H(p(c|u))] − H(E[p(c|u)]) of the normalized
    latents u adds up the single bits' entropies (paper, section 4). Since the error is bounded,
    there is no commitment loss.
    """

    def __init__(
        self,
        *,
        num_bits: Annotated[int, Integer(1, 2**10)] = 18,
        entropy_weight: Annotated[float, Number(0)] = 0.1,
        temperature: Annotated[float, Number(0, excluded=0)] = 1.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs  # nothing is drawn
        self._set_up(num_bits)
        self.scale = num_bits**-0.5
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.param_dtype = param_dtype

    @classmethod
    def fixed_latent_dim(cls, options: Mapping[str, Any]) -> int:
        return options["num_bits"]

    def prepare(self, latents: Float[Array, "... num_bits"]) -> Float[Array, "... num_bits"]:
        return normalize(latents)

    def quantize(
        self, latents: Float[Array, "... num_bits"]
    ) -> tuple[Float[Array, "... num_bits"], Int[Array, "... num_bits"]]:
        codes = (jax.lax.stop_gradient(latents) >= 0).astype(jnp.int32)
        return self.lookup(codes), codes

    def losses(
        self,
        latents: Float[Array, "... num_bits"],
        quantized: Float[Array, "... num_bits"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        del quantized
        logits = self.logits(latents, self.temperature)
        entropy = mean_entropy(logits, where)
        batch_entropy = entropy_of_mean(logits, where, factorized=True)
        loss = self.entropy_weight * (entropy - batch_entropy)
        return loss, {"entropy": entropy, "batch_entropy": batch_entropy}
