"""Estimates a code model from the codes of a split, in one pass and in bounded memory.

The codes come in blocks. Each block's codes are counted, and the counts are added to a table in the
order of the blocks. The table keeps the `_MOST_CANDIDATES` codes with the highest counts; in the
end the first `_MOST_CODES` of them are the vocabulary. Contexts need their frequent codes from the
start, so these come from the first block. The result depends on the blocks alone: several
processes, each of which counts some of the blocks, exchange the counts and add them up in the same
order.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped, UInt64

from llvq.codec import integers
from llvq.codec.code_model import CodeModel, Contexts, frequencies
from llvq.runtime.distributed import all_gather
from llvq.usage.counting import keys

_MOST_CODES = 2**14
_MOST_CANDIDATES = 4 * _MOST_CODES
_MOST_PAIRS = 2**17
_LEAST_COUNT = 2
_MOST_FREQUENT = 16  # each of these codes is a class of its own as a neighbour


class _Counts(NamedTuple):
    """The numbers of occurrences of codes, in the order of their keys.

    Attributes:
      keys: fingerprints, or (context, fingerprint).
      counts: the numbers of occurrences.
      rows: the codes themselves; empty for pairs.
    """

    keys: Shaped[np.ndarray, "n ..."]
    counts: Int64[np.ndarray, "n"]
    rows: Int32[np.ndarray, "n width"]


class _BlockCounts(NamedTuple):
    """The counts of one or more blocks, in NumPy arrays, which processes can exchange.

    Attributes:
      codes: the distinct codes.
      pairs: the distinct pairs of context and code.
      contexts: the number of codes in each context.
      digits: the number of occurrences of each of `integers`' symbols, by position in the code.
    """

    codes: _Counts
    pairs: _Counts
    contexts: Int64[np.ndarray, "contexts"]
    digits: Int64[np.ndarray, "width symbols"]


def estimate(
    blocks: Iterable[Int[np.ndarray, "n height width ..."]],
    code_width: int,
    parameters: str,
) -> CodeModel:
    """Estimates a code model. All processes must call this at the same time.

    Args:
      blocks: the codes; with several processes, this process's share, every n-th block.
      code_width: the number of integers in a code.
      parameters: the digest of the parameters; see `CodeModel`.

    Raises:
      ValueError: if there are no blocks.
    """
    remaining = iter(blocks)
    block = next(remaining, None)
    (frequent, *_) = all_gather(None if block is None else _frequent(block, code_width))
    if frequent is None:
        raise ValueError("there are no codes to estimate a model from")
    own = (
        _count(some, code_width, frequent)
        for some in itertools.chain([block], remaining)
        if some is not None
    )
    total = functools.reduce(_add, _in_turn(own))
    return _finish(total, frequent, parameters)


def _in_turn(own: Iterator[_BlockCounts]) -> Iterator[_BlockCounts]:
    """Yields the counts of all processes' blocks in order."""
    while counted := [counts for counts in all_gather(next(own, None)) if counts is not None]:
        yield from counted


def _frequent(
    block: Int[np.ndarray, "n height width ..."], code_width: int
) -> UInt64[np.ndarray, "m"]:
    """Chooses the codes that are a class of their own as neighbours; returns ascending keys."""
    found, counts = np.unique(keys(block.reshape(-1, code_width)), return_counts=True)
    return np.sort(found[_most_frequent(counts, _MOST_FREQUENT)])


def _most_frequent(counts: Int64[np.ndarray, "n"], number: int) -> Int64[np.ndarray, "m"]:
    """Returns the places of the highest counts, by falling count; the first of equal ones."""
    return np.argsort(-counts, kind="stable")[:number]


def _kept(counted: _Counts, number: int) -> _Counts:
    """Keeps the most frequent codes, in the order of their keys."""
    if len(counted.keys) <= number:
        return counted
    places = np.sort(_most_frequent(counted.counts, number))
    return _Counts(*(array[places] for array in counted))


def _count(
    codes: Int[np.ndarray, "n height width ..."], code_width: int, frequent: UInt64[np.ndarray, "m"]
) -> _BlockCounts:
    rows = codes.reshape(-1, code_width)
    found, index, inverse, counts = np.unique(
        keys(rows), return_index=True, return_inverse=True, return_counts=True
    )
    distinct = _Counts(found, counts, rows[index])
    digits = _count_digits(distinct.rows, distinct.counts)

    places = np.minimum(np.searchsorted(frequent, found), len(frequent) - 1)
    classes = np.where(frequent[places] == found, places, len(frequent))
    num_classes = len(frequent) + 2
    n, height, width = codes.shape[:3]
    padded = np.full((n, height + 1, width + 1), num_classes - 1)
    padded[:, 1:, 1:] = classes[inverse].reshape(n, height, width)
    contexts = (padded[:, 1:, :-1] * num_classes + padded[:, :-1, 1:]).reshape(-1)
    pairs, counts = np.unique(contexts * len(found) + inverse, return_counts=True)
    context, code = np.divmod(pairs, len(found))
    return _BlockCounts(
        _kept(distinct, _MOST_CANDIDATES),
        _kept(
            _Counts(
                np.stack([context.astype(np.uint64), found[code]], axis=1),
                counts,
                np.empty((len(pairs), 0), np.int32),
            ),
            _MOST_PAIRS,
        ),
        np.bincount(contexts, minlength=num_classes**2),
        digits,
    )


def _count_digits(
    rows: Int32[np.ndarray, "n width"], counts: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "width symbols"]:
    width = rows.shape[1]
    symbols = integers.split(rows).symbols + integers.NUM_SYMBOLS * np.arange(width)
    # Sums of counts are exact, because they are far below 2^53.
    weights = np.repeat(counts, width)
    sums = np.bincount(symbols.reshape(-1), weights, minlength=width * integers.NUM_SYMBOLS)
    return sums.astype(np.int64).reshape(width, -1)


def _add(total: _BlockCounts, more: _BlockCounts) -> _BlockCounts:
    return _BlockCounts(
        _kept(_merge(total.codes, more.codes), _MOST_CANDIDATES),
        _kept(_merge(total.pairs, more.pairs), _MOST_PAIRS),
        total.contexts + more.contexts,
        total.digits + more.digits,
    )


def _merge(a: _Counts, b: _Counts) -> _Counts:
    both, counts, rows = (np.concatenate(pair) for pair in zip(a, b, strict=True))
    columns = both.reshape(len(both), -1)
    order = np.lexsort(columns.T[::-1])
    columns = columns[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any(columns[1:] != columns[:-1], axis=1)
    starts = np.flatnonzero(is_new)
    return _Counts(both[order][starts], np.add.reduceat(counts[order], starts), rows[order][starts])


def _finish(total: _BlockCounts, frequent: UInt64[np.ndarray, "m"], parameters: str) -> CodeModel:
    known, counts, rows = total.codes
    places = _most_frequent(counts, _MOST_CODES)
    places = places[: max(1, int(np.sum(counts[places] >= _LEAST_COUNT)))]
    known, counts, rows = known[places], counts[places], rows[places]
    num_vectors = int(total.contexts.sum())
    num_escaped = num_vectors - int(counts.sum())
    digits = total.digits - _count_digits(rows, counts)
    return CodeModel(
        parameters,
        rows,
        frequencies(np.append(counts, num_escaped)),
        np.stack([frequencies(row) for row in digits]),
        _finish_contexts(total, frequent, known),
    )


def _finish_contexts(
    total: _BlockCounts, frequent: UInt64[np.ndarray, "m"], vocabulary_keys: UInt64[np.ndarray, "v"]
) -> Contexts:
    """Makes the tables of contexts from the pairs whose code is in the vocabulary."""
    order = np.argsort(vocabulary_keys)
    ascending = vocabulary_keys[order]

    def ids_of(some: UInt64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        places = np.minimum(np.searchsorted(ascending, some), len(ascending) - 1)
        return np.where(ascending[places] == some, order[places], -1)

    pairs, counts, _ = total.pairs
    contexts, ids = pairs[:, 0].astype(np.int64), ids_of(pairs[:, 1])
    has_entry = (counts >= _LEAST_COUNT) & (ids >= 0)
    contexts, ids, counts = contexts[has_entry], ids[has_entry], counts[has_entry]
    tables = []
    for context, num_vectors in enumerate(total.contexts):
        entries = np.flatnonzero(contexts == context)
        entries = entries[np.argsort(ids[entries])]
        num_escaped = num_vectors - counts[entries].sum()
        tables.append(
            (np.append(ids[entries], -1), frequencies(np.append(counts[entries], num_escaped)))
        )
    ids, shares = (np.concatenate(arrays).astype(np.int32) for arrays in zip(*tables, strict=True))
    ends = np.cumsum([len(table) for table, _ in tables]).astype(np.int32)
    return Contexts(ids_of(frequent).astype(np.int32), ends, ids, shares)
