"""Hashes by which codes are told apart."""

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int, UInt32


def position_offsets(width: int) -> np.ndarray:
    """What is added to each of a code's integers before they are mixed, uint32 [width].

    From raw Philox bits, a stream that NumPy promises never to change.
    """
    return (np.random.Philox(key=0).random_raw(width) >> 32).astype(np.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit numbers that looks random: C. Wellons's lowbias32 (2018)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _mix_again(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Another one: the finalizer of A. Appleby's MurmurHash3 (2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fingerprints(codes: Int[Array, "n width"]) -> tuple[UInt32[Array, "n"], UInt32[Array, "n"]]:
    """A 64-bit hash of each row, as two words: (low, high).

    Tabulation hashing with sums (Zobrist 1970; Carter and Wegman 1979), whose tables are computed:
    each integer, offset by its position, is mixed to a word and that to another; the words of all
    positions are added and mixed once more. So a row is read once, in one reduction, which XLA
    makes fast on every backend; hashes made for byte streams take many times as long on a CPU.
    """
    words = jax.lax.bitcast_convert_type(codes, jnp.uint32)
    high = _mix(words + position_offsets(codes.shape[1]))
    low = _mix_again(high)
    zero = np.uint32(0)
    low, high = jax.lax.reduce(
        (low, high), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,)
    )
    high = _mix_again(high)
    return _mix(low + high), high
