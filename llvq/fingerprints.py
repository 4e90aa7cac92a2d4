"""Hashes by which codes are told apart."""

import jax
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


def fingerprints(codes: Int[Array, "n width"]) -> UInt32[Array, "4 n"]:
    """A 128-bit hash of each row: MurmurHash3_x86_128 (A. Appleby, 2011) with seed 0.

    Rows are filled up with zeros to a multiple of four, the hash's block. Word by word, not row by
    row: accelerators pad an array's last axis.
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
    return jnp.stack(state)
