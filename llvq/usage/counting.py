"""The codes of one batch, counted on the device on which they arise.

Every device sorts the fingerprints of its own share: nothing passes between devices while a split
streams by, and little between device and host (see `CodeCounts`).
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Int32, UInt32, UInt64

from llvq.runtime import sharding

_HEAD = 4096


class CodeCounts(NamedTuple):
    """How often each code occurs in a batch. The first axis of every array is the device axis.

    A code's key is its fingerprint, as two words, the lower one first.

    Attributes:
      num_vectors: vectors counted.
      smallest: the smallest value of each entry of the codes, over the vectors counted.
      largest: the largest value, likewise.
      num_kept: how many of their keys begin with as many zero bits as the level asks.
      num_distinct: how many of those keys are different.
      head: the first different keys, in ascending order: key and number of occurrences.
      keys: the keys kept, in ascending order, in pieces. Each piece but the first is as long as all
        pieces before it. The host needs them only if the head is too short, and then only the
        pieces that `num_kept` reaches into.
    """

    num_vectors: Int32[Array, "devices"]
    smallest: Int32[Array, "devices width"]
    largest: Int32[Array, "devices width"]
    num_kept: Int32[Array, "devices"]
    num_distinct: Int32[Array, "devices"]
    head: UInt32[Array, "devices 3 head"]
    keys: tuple[UInt32[Array, "devices 2 piece"], ...]


def count_codes(
    codes: Int[Array, "batch height ..."],
    mask: Bool[Array, "batch"],
    levels: Int32[Array, "devices"],
    *,
    code_width: int,
    mesh: Mesh,
) -> CodeCounts:
    """Counts the codes of a batch. Call it inside jit.

    Args:
      codes: of a batch of images, split over the mesh.
      mask: the images that count.
      levels: how many zero bits a key must begin with to be kept, for each device: 0 keeps all.
        It is an input, so that raising it does not recompile.
      code_width: how many integers make up a code: the length of the last axis of `codes`, or 1
        where codes are scalars and there is no such axis.
      mesh: the devices.
    """
    shardings = (sharding.images_sharded, sharding.batch_sharded, sharding.device_sharded)
    of_codes, of_mask, by_device = (split(mesh).spec for split in shardings)
    return jax.shard_map(
        functools.partial(_count_share, code_width=code_width),
        mesh=mesh,
        in_specs=(of_codes, of_mask, by_device),
        out_specs=by_device,
    )(codes, mask, levels)


def _count_share(
    codes: Int[Array, "batch ..."],
    mask: Bool[Array, "batch"],
    level: Int32[Array, "1"],
    *,
    code_width: int,
) -> CodeCounts:
    # Codes are read several times: without the barrier XLA fuses what makes them into every reader.
    images = jax.lax.optimization_barrier(codes.reshape(len(mask), -1, code_width))
    limits = jnp.iinfo(jnp.int32)
    # Masking whole images takes far less time than masking vectors.
    smallest = jnp.where(mask[:, None], jnp.min(images, axis=1), limits.max)
    largest = jnp.where(mask[:, None], jnp.max(images, axis=1), limits.min)
    rows = images.reshape(-1, code_width)
    counts = jnp.broadcast_to(mask[:, None], images.shape[:2]).reshape(-1)
    # One operand of 64 bits is what XLA sorts fast, on CPU and GPU alike.
    unsorted = keys(rows)
    with jax.enable_x64(True):
        is_kept = counts & (jax.lax.clz(unsorted) >= level.astype(jnp.uint64))
        num_kept = jnp.sum(is_kept, dtype=jnp.int32)
        # Dropped keys sort to the end, so that the first num_kept stay, even if one is all ones.
        ordered = jax.lax.sort(jnp.where(is_kept, unsorted, ~jnp.uint64(0)))
        is_first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
        is_first &= jnp.arange(len(ordered), dtype=jnp.int32) < num_kept
        ordinals = jnp.cumsum(is_first, dtype=jnp.int32)
        # Searching for a few runs is faster than compacting all keys, which takes a scatter.
        wanted = jnp.arange(1, min(_HEAD, len(ordered)) + 2, dtype=jnp.int32)
        starts = jnp.minimum(jnp.searchsorted(ordinals, wanted).astype(jnp.int32), num_kept)
        head_keys = _words(ordered.at[starts[:-1]].get(mode="clip"))
        words = _words(ordered)
    head = jnp.concatenate([head_keys, jnp.diff(starts).astype(jnp.uint32)[None]])
    boundaries = [_HEAD * 2**i for i in range(32) if _HEAD * 2**i < len(rows)]
    results = CodeCounts(
        num_vectors=jnp.sum(counts, dtype=jnp.int32),
        smallest=jnp.min(smallest, axis=0),
        largest=jnp.max(largest, axis=0),
        num_kept=num_kept,
        num_distinct=ordinals[-1],
        head=head,
        keys=tuple(jnp.split(words, boundaries, axis=1)),
    )
    return jax.tree.map(lambda x: x[None], results)


def _words(keys: UInt64[Array, "n"]) -> UInt32[Array, "2 n"]:
    return jnp.stack([keys.astype(jnp.uint32), (keys >> jnp.uint64(32)).astype(jnp.uint32)])


def position_offsets(width: int) -> np.ndarray:
    """Offsets that are added to a code's integers before mixing, uint32 [width].

    They are raw Philox bits, a stream that NumPy promises never to change.
    """
    return (np.random.Philox(key=0).random_raw(width) >> 32).astype(np.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit numbers that looks random: C. Wellons's lowbias32 (2018)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _mix_again(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A second permutation: the finalizer of A. Appleby's MurmurHash3 (2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def keys(codes: Int[Array, "n width"]) -> UInt64[Array, "n"]:
    """The fingerprint of each row as one number."""
    low, high = fingerprints(codes)
    with jax.enable_x64(True):
        return high.astype(jnp.uint64) << jnp.uint64(32) | low.astype(jnp.uint64)


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
