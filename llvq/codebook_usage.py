"""How much of its codebook a quantizer uses: distinct codes and perplexity, counted exactly.

Codes are compared by 128-bit fingerprints, so that a lattice code of 64 integers costs 16 bytes:
among n distinct codes two share a fingerprint with a probability below n² / 2¹²⁹ (2e-25 for 12
million).
"""

import math

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int, UInt32

_MULTIPLIERS = (0x239B961B, 0xAB0E9789, 0x38B34AE5, 0xA1E38B93)
_KEY_ROTATIONS = (15, 16, 17, 18)
_STATE_ROTATIONS = (19, 17, 15, 13)
_OFFSETS = (0x561CCD1B, 0x0BCAA747, 0x96CD1C35, 0x32AC3B17)


def _rotate(x: UInt32[Array, "n"], bits: int) -> UInt32[Array, "n"]:
    return (x << bits) | (x >> (32 - bits))


def _finalize(x: UInt32[Array, "n"]) -> UInt32[Array, "n"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fingerprints(codes: Int[Array, "n width"]) -> UInt32[Array, "n 4"]:
    """A 128-bit hash of each row: MurmurHash3_x86_128 (A. Appleby, 2011) with seed 0.

    Rows are filled up with zeros to a multiple of four, the hash's block.
    """
    width = codes.shape[1]
    words = jnp.pad(codes, ((0, 0), (0, -width % 4)))
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    state = [jnp.zeros(codes.shape[0], jnp.uint32)] * 4
    for block in range(words.shape[1] // 4):
        for lane in range(4):
            key = words[:, 4 * block + lane] * jnp.uint32(_MULTIPLIERS[lane])
            key = _rotate(key, _KEY_ROTATIONS[lane])
            key *= jnp.uint32(_MULTIPLIERS[(lane + 1) % 4])
            mixed = _rotate(state[lane] ^ key, _STATE_ROTATIONS[lane]) + state[(lane + 1) % 4]
            state[lane] = mixed * jnp.uint32(5) + jnp.uint32(_OFFSETS[lane])
    length = jnp.uint32(4 * words.shape[1])
    for finalize in (lambda x: x ^ length, _finalize):
        state = [finalize(x) for x in state]
        state[0] = state[0] + state[1] + state[2] + state[3]
        state[1:] = [x + state[0] for x in state[1:]]
    return jnp.stack(state, axis=1)


class CodebookUsage:
    """Counts codes, given as fingerprints, batch by batch."""

    def __init__(self) -> None:
        self.num_vectors = 0
        self._keys = np.empty((0, 2), np.uint64)  # distinct, sorted
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, batch: UInt32[np.ndarray, "n 4"]) -> None:
        """Counts the fingerprints of a batch."""
        self.num_vectors += len(batch)
        keys = np.ascontiguousarray(batch).view(np.uint64)
        self._pending.append(_count(keys, np.ones(len(keys), np.int64)))
        self._num_pending += len(self._pending[-1][0])
        # Merging only when as much waits as is there already keeps the whole cost n log n.
        if self._num_pending > max(len(self._keys), 2**20):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        keys, counts = zip((self._keys, self._counts), *self._pending, strict=True)
        self._keys, self._counts = _count(np.concatenate(keys), np.concatenate(counts))
        self._pending.clear()
        self._num_pending = 0

    @property
    def num_distinct(self) -> int:
        """The effective codebook size: how many different codes have occurred."""
        self._merge()
        return len(self._keys)

    @property
    def perplexity(self) -> float:
        """exp(entropy) of the codes' frequencies: 1 for one code, num_distinct if all are even."""
        self._merge()
        frequencies = self._counts / self.num_vectors
        return math.exp(-np.sum(frequencies * np.log(frequencies)))


def _count(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of keys [n, 2], sorted, and the sum of counts [n] of each."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, counts = keys[order], counts[order]
    first = np.ones(len(keys), bool)
    first[1:] = np.any(keys[1:] != keys[:-1], axis=1)
    starts = np.flatnonzero(first)
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts
