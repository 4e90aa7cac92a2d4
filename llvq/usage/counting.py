"""The codes of one batch, counted on the device on which they arise.

Every device sorts the fingerprints of its own share: nothing passes between devices while a split
streams by, and little between device and host (see `CodeCounts`).
"""

import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Int32, UInt32, UInt64

from llvq.runtime import sharding
from llvq.usage.fingerprints import fingerprints

_HEAD = 4096


class CodeCounts(NamedTuple):
    """How often which codes occur in a batch; the first axis of all arrays is that of the devices.

    A code's key is its fingerprint, as two words, the lower one first.

    Attributes:
      num_vectors: vectors counted.
      smallest: of each entry of the codes, over the vectors counted.
      largest: likewise.
      num_kept: of those vectors, how many keys begin with as many zero bits as the level asks.
      num_distinct: of those keys, how many are different.
      head: of the first different keys, in ascending order: key and number of occurrences.
      keys: the keys kept, in ascending order, in pieces of which each but the first is as long as
        all before it. Only if the head is too short does the host need them, and no more pieces
        than `num_kept` reaches into.
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
    """Counts the codes of a batch; to be called inside jit.

    Args:
      codes: of a batch of images, split over the mesh.
      mask: the images that count.
      levels: how many zero bits a key must begin with to be kept, for each device: 0 keeps all.
        No compile-time constant, so that raising it costs nothing.
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
    # Masking images rather than vectors spares most of the time.
    smallest = jnp.where(mask[:, None], jnp.min(images, axis=1), limits.max)
    largest = jnp.where(mask[:, None], jnp.max(images, axis=1), limits.min)
    rows = images.reshape(-1, code_width)
    counts = jnp.broadcast_to(mask[:, None], images.shape[:2]).reshape(-1)
    low, high = fingerprints(rows)
    # One operand of 64 bits is what XLA sorts fast, on CPU and GPU alike.
    with jax.enable_x64(True):
        unsorted = high.astype(jnp.uint64) << jnp.uint64(32) | low.astype(jnp.uint64)
        is_kept = counts & (jax.lax.clz(unsorted) >= level.astype(jnp.uint64))
        num_kept = jnp.sum(is_kept, dtype=jnp.int32)
        # What is left out goes to the end: the first num_kept stay, even if one is all ones itself.
        keys = jax.lax.sort(jnp.where(is_kept, unsorted, ~jnp.uint64(0)))
        is_first = jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
        is_first &= jnp.arange(len(keys), dtype=jnp.int32) < num_kept
        ordinals = jnp.cumsum(is_first, dtype=jnp.int32)
        # Searching for a few runs is faster than compacting all keys, which takes a scatter.
        wanted = jnp.arange(1, min(_HEAD, len(keys)) + 2, dtype=jnp.int32)
        starts = jnp.minimum(jnp.searchsorted(ordinals, wanted).astype(jnp.int32), num_kept)
        head_keys = _words(keys.at[starts[:-1]].get(mode="clip"))
        words = _words(keys)
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
