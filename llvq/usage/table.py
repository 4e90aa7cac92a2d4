"""How much of its codebook a quantizer uses: distinct codes, their entropy and perplexity.

One table serves any number of codes, by adaptive sampling (Wegner's algorithm; P. Flajolet, "On
adaptive sampling", Computing 43, 1990). It holds the 64-bit key of each distinct code with the
code's number of occurrences: everything is exact. Once more than `BUDGET` codes have occurred, the
level rises: of all codes only those whose key begins with `level` zero bits are kept, a fraction
p = 2^−level, and every such code has been counted since its first occurrence. From n kept codes

    distinct codes = n / p                      ± √((1 − p) / n) of it, below 0.036%
    entropy        = log N − Σ c·log c / (p·N)  ± √((1 − p) · Σ (c·log c)²) / (p·N)

with the counts c of the kept codes and the number N of all vectors (the Horvitz–Thompson
estimator and its variance as the sample gives it; ± is one standard error). The error does not
grow with N. Codes that occurred once add nothing to the second sum: for a dense lattice the entropy
is almost exact. Conversely, if there are more than `BUDGET` distinct codes and yet a few of them
hold a large share of all vectors, the sample probably misses those few. That shows: Σ c / p falls
short of N by more than chance allows. The entropy is then too high by at most M·log M / N, where M
is the number of missing vectors; its error is widened by that.

Keys are hashes: among n distinct codes two have the same key, so that one goes uncounted, with a
probability below n² / 2⁶⁵: 4e-6 for 12 million codes.

The table is a function of the codes that occurred and of nothing else: neither of their order nor
of the number of devices and hosts. Memory on the host: 16 bytes for each of `BUDGET` keys and of
`_PENDING` that wait to be merged, 320 MiB, and 1.1 GiB in all while merging.
"""

import functools
import itertools
import math

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float64, Int, Int32, Int64, Shaped, UInt64

from llvq.runtime import sharding
from llvq.runtime.distributed import all_gather
from llvq.usage import counting
from llvq.usage.counting import CodeCounts

BUDGET = 2**24
_PENDING = 2**22
_CHANCE = 4  # standard errors beyond which something is no accident


class CodebookUsage:
    """Counts codes, batch by batch.

    Attributes:
      num_vectors: how many vectors have been counted.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        """Args:
        budget: up to how many distinct codes are counted exactly.
        """
        self._level = 0
        self.num_vectors = 0
        self._budget = budget
        limits = np.iinfo(np.int32)
        self._smallest = np.array(limits.max, np.int32)  # [code_width] from the first batch on
        self._largest = np.array(limits.min, np.int32)
        self._keys = np.empty(0, np.uint64)  # distinct, ascending
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def levels(self, mesh: Mesh) -> Int32[Array, "devices"]:
        """The level, in the form that `count_codes` takes; hosts need not agree on it."""
        return jax.make_array_from_process_local_data(
            sharding.device_sharded(mesh),
            np.full(len(mesh.local_devices), self._level, np.int32),
        )

    def add(self, batch: CodeCounts) -> None:
        """Adds what this host's devices have counted in a batch."""
        *figures, heads = jax.device_get([_shards(field) for field in batch[:-1]])
        pieces = [_shards(piece) for piece in batch.keys]
        for device, (num_vectors, smallest, largest, num_kept, num_distinct, head) in enumerate(
            zip(*figures, heads, strict=True)
        ):
            self.num_vectors += int(num_vectors)
            self._smallest = np.minimum(self._smallest, smallest)
            self._largest = np.maximum(self._largest, largest)
            if num_distinct <= head.shape[1]:
                low, high, counts = head[:, :num_distinct]
                self._append(_join(low, high), counts.astype(np.int64))
            else:
                words = _leading([piece[device] for piece in pieces], int(num_kept))
                keys = _join(*words)
                self._append(*_count(keys, np.ones(len(keys), np.int64)))

    def add_codes(self, codes: Int[np.ndarray, "n height width ..."]) -> None:
        """Adds the codes of images, which are on the host."""
        rows = codes.reshape(math.prod(codes.shape[:3]), -1)
        self.num_vectors += len(rows)
        self._smallest = np.minimum(self._smallest, rows.min(axis=0))
        self._largest = np.maximum(self._largest, rows.max(axis=0))
        found, counts = np.unique(np.asarray(counting.keys(rows)), return_counts=True)
        kept = _num_below(found, self._limit)
        self._append(found[:kept], counts[:kept])

    def _append(self, keys: UInt64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"]) -> None:
        self._pending.append((keys, counts))
        self._num_pending += len(keys)
        if self._num_pending > _PENDING:
            self._merge()

    def _merge(self) -> None:
        """Brings what waits into the table; raises the level until it fits the budget."""
        if not self._pending:
            return
        keys, counts = zip((self._keys, self._counts), *self._pending, strict=True)
        self._pending.clear()
        self._num_pending = 0
        merged_keys, merged_counts = _count(np.concatenate(keys), np.concatenate(counts))
        while (kept := _num_below(merged_keys, self._limit)) > self._budget:
            self._level += 1
        self._keys, self._counts = merged_keys[:kept].copy(), merged_counts[:kept].copy()

    @property
    def _limit(self) -> int:
        """The upper bound of the keys of this level."""
        return 2 ** (64 - self._level)

    def over_all_hosts(self) -> "CodebookUsage":
        """The counts of all hosts together. All hosts must call it at the same time."""
        if jax.process_count() == 1:
            return self
        self._merge()
        levels, num_vectors, sizes = _gather(
            np.array([self._level, self.num_vectors, len(self._keys)])
        ).T
        merged = CodebookUsage(self._budget)
        merged._level = int(levels.max())
        merged.num_vectors = int(num_vectors.sum())
        # A host that has seen no codes does not know their width: its bounds are scalars.
        merged._smallest = functools.reduce(np.minimum, all_gather(self._smallest))
        merged._largest = functools.reduce(np.maximum, all_gather(self._largest))
        # Slices of the keys' range: no host holds all hosts' tables at once.
        num_slices = int(sizes.max()) * len(sizes) // _PENDING + 1
        bounds = [merged._limit * i // num_slices for i in range(num_slices + 1)]
        edges = np.array([_num_below(self._keys, bound) for bound in bounds])
        lengths = np.diff(_gather(edges))  # [hosts, slices]
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            if bounds[i] >= merged._limit:  # the level has risen since
                break
            share = np.zeros((2, lengths.max()), np.int64)
            share[0, : stop - start] = self._keys[start:stop].view(np.int64)
            share[1, : stop - start] = self._counts[start:stop]
            for (keys, counts), length in zip(_gather(share), lengths[:, i], strict=True):
                merged._append(keys[:length].view(np.uint64), counts[:length])
        return merged

    @property
    def level(self) -> int:
        """Codes are in the table with a probability of 2^−level."""
        self._merge()
        return self._level

    @property
    def is_exact(self) -> bool:
        """Whether all codes are in the table, so that all figures are exact."""
        return self.level == 0

    @property
    def num_distinct(self) -> int:
        """The effective codebook size: how many different codes have occurred."""
        self._merge()
        return len(self._keys) << self._level

    @property
    def standard_error(self) -> float:
        """Standard error of num_distinct, as a fraction of it; 0 if that is exact."""
        self._merge()
        return math.sqrt((1 - 2.0**-self._level) / max(len(self._keys), 1))

    def _terms(self) -> Float64[np.ndarray, "codes"]:
        """c·log2 c of every count c in the table."""
        self._merge()
        return self._counts * np.log2(self._counts)

    @property
    def entropy(self) -> float:
        """Entropy of the codes' frequencies, in bits per vector."""
        if not self.num_vectors:
            return 0.0
        total = float(np.sum(self._terms())) * 2**self._level
        return max(math.log2(self.num_vectors) - total / self.num_vectors, 0.0)

    @property
    def entropy_standard_error(self) -> float:
        """Standard error of the entropy, in bits per vector; 0 if that is exact.

        It is wider if frequent codes were missed.
        """
        if self.is_exact:
            return 0.0
        scale = math.sqrt(1 - 2.0**-self._level) * 2**self._level
        error = scale * float(np.linalg.norm(self._terms())) / self.num_vectors
        missing = self.num_vectors - float(np.sum(self._counts)) * 2**self._level
        chance = _CHANCE * scale * float(np.linalg.norm(self._counts))
        if missing > chance:
            at_most = missing + chance
            error += at_most * math.log2(at_most) / self.num_vectors
        return error

    @property
    def perplexity(self) -> float:
        """2^entropy: 1 for one code, num_distinct if all are even."""
        return 2.0**self.entropy

    @property
    def num_entries_in_use(self) -> int:
        """How many of a code's integers have taken more than one value."""
        return int(np.sum(self._largest > self._smallest))


def _shards(array: Shaped[Array, "devices ..."]) -> list[Shaped[Array, "1 ..."]]:
    return [shard.data[0] for shard in array.addressable_shards]


def _leading(pieces: list[Array], length: int) -> np.ndarray:
    """The first columns of arrays [2, n] joined, fetching no more of them than that takes."""
    ends = itertools.accumulate(piece.shape[1] for piece in pieces)
    needed = [p for p, end in zip(pieces, ends, strict=True) if end - p.shape[1] < length]
    return np.concatenate(jax.device_get(needed), axis=1)[:, :length]


def _join(low: np.ndarray, high: np.ndarray) -> UInt64[np.ndarray, "n"]:
    return high.astype(np.uint64) << np.uint64(32) | low


def _num_below(keys: UInt64[np.ndarray, "n"], bound: int) -> int:
    """How many of ascending keys are below a bound of up to 2^64."""
    return len(keys) if bound == 2**64 else int(np.searchsorted(keys, np.uint64(bound)))


def _count(
    keys: UInt64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"]
) -> tuple[UInt64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
    """The distinct keys, ascending, and the sum of the counts of each."""
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(
        np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])
    )
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def _gather(array: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "hosts ..."]:
    """The arrays of all hosts, stacked; of equal shape on each."""
    return np.stack(all_gather(array))
