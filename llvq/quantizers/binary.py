"""Base class of LFQ and BSQ: codes of bits, and the entropies of softly assigned bits.

A latent z belongs to the code c with probability p(c|z) ∝ exp(−‖z − c‖² / τ). For codes in {±a}ᵈ
that is a product over the coordinates: bit i is set with probability σ(4·a·zᵢ / τ). The BSQ paper
writes τ for 2/τ.
"""

import math
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llvq.quantizers.base import Quantizer, mean

_PRECISION = lax.Precision.HIGHEST


class BinaryQuantizer(Quantizer):
    """Replaces each coordinate by ±scale. Codes are bits: int32 [batch, ..., num_bits], 0 or 1."""

    scale: float

    def _set_up(self, num_bits: int) -> None:
        self.latent_dim = num_bits
        self.code_shape = (num_bits,)
        self.levels = (2,) * num_bits

    def lookup(self, codes: Int[Array, "... num_bits"]) -> Float[Array, "... num_bits"]:
        return self.scale * (2 * codes - 1).astype(self.param_dtype)

    def logits(
        self, latents: Float[Array, "... num_bits"], temperature: float
    ) -> Float[Array, "... num_bits"]:
        """Returns the log odds of each bit."""
        return (4.0 * self.scale / temperature) * latents


@jax.custom_jvp
def _probabilities(
    logits: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the probabilities that a bit is 1 and that it is 0, without cancellation."""
    odds = jnp.exp(-jnp.abs(logits))  # of the less likely value
    likely = 1 / (1 + odds)
    unlikely = odds * likely
    is_one = logits > 0
    return jnp.where(is_one, likely, unlikely), jnp.where(is_one, unlikely, likely)


@_probabilities.defjvp
def _(primals: Any, tangents: Any) -> Any:
    one, zero = _probabilities(*primals)
    change = one * zero * tangents[0]
    return (one, zero), (change, -change)


@jax.custom_jvp
def _entropies(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the entropy of each bit, in nats."""
    unlikely = jnp.minimum(*_probabilities(logits))
    return jnp.abs(logits) * unlikely - jnp.log1p(-unlikely)


@_entropies.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (logits,) = primals
    one, zero = _probabilities(logits)
    return _entropies(logits), -logits * one * zero * tangents[0]


def mean_entropy(
    logits: Float[Array, "... num_bits"], where: Bool[Array, "..."] | None
) -> Float[Array, ""]:
    """Returns E[H(p(c|z))] in nats, the mean over the latents of the entropy of their bits."""
    return logits.shape[-1] * mean(_entropies(logits), where)


def entropy_of_mean(
    logits: Float[Array, "... num_bits"], where: Bool[Array, "..."] | None, *, factorized: bool
) -> Float[Array, ""]:
    """Returns H(E[p(c|z)]) in nats: how evenly a batch uses the codes.

    The derivative of Σ p·log p is Σ (log p + 1)·dp, of which the 1 cancels, since Σ p is constant.
    Holding the logarithms constant leaves out what cancels, and its rounding errors with it.

    Args:
      logits: of the bits.
      where: the latents that count, [batch, 1, ..., 1].
      factorized: whether to add up the entropies of the single bits, which is an upper bound,
        instead of going over all 2 ** num_bits codes.
    """
    weights = jnp.ones((*logits.shape[:-1], 1), logits.dtype)
    weights = weights if where is None else weights * where
    total = jnp.maximum(jnp.sum(weights), 1)
    if factorized:
        axes = tuple(range(logits.ndim - 1))
        means = [
            jnp.sum(weights * values, axis=axes) / total
            for values in (*_probabilities(logits), jnp.tanh(logits / 2))
        ]
        probabilities, excess = jnp.stack(means[:2]), jnp.stack([means[2], -means[2]])
        # Near 1/2 the logarithm of 2p keeps its digits only as log1p(2p − 1).
        logs = jnp.where(
            jnp.abs(excess) < 0.5,
            jnp.log1p(jnp.clip(excess, -0.5, 0.5)),
            jnp.log(jnp.maximum(2 * probabilities, jnp.finfo(excess.dtype).tiny)),
        )
        return jnp.sum(math.log(2) - jnp.sum(probabilities * lax.stop_gradient(logs), axis=0))
    # The codes are the pairs of a first and a second half, and a code's probability is the product
    # of theirs. So the mean over the latents is a product of two matrices.
    first, second = map(_joint, jnp.array_split(logits, 2, axis=-1))
    sums = jnp.einsum("...a,...b->ab", weights * first, second, precision=_PRECISION)
    num_codes = 2 ** logits.shape[-1]
    excess = num_codes * sums / total
    logs = jnp.log(jnp.maximum(excess, jnp.finfo(excess.dtype).tiny))
    return math.log(num_codes) - jnp.mean(excess * lax.stop_gradient(logs))


def _joint(logits: Float[Array, "... bits"]) -> Float[Array, "... codes"]:
    """Returns the probabilities of all combinations of bits."""
    joint = jnp.ones((*logits.shape[:-1], 1), logits.dtype)
    for bit in range(logits.shape[-1]):
        one, zero = _probabilities(logits[..., bit : bit + 1])
        joint = jnp.concatenate([joint * zero, joint * one], axis=-1)
    return joint
