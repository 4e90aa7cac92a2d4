"""Splits any int32 into a symbol of a small alphabet and a few more bits.

A magnitude of at most six bits is a symbol of its own. A larger one keeps its `_LEADING` + 1
leading bits in the symbol; the lower bits, which are hardly predictable, follow unchanged. So a
table of `NUM_SYMBOLS` entries describes integers of any size with the same relative accuracy.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt32

_LEADING = 5
_MOST_LOW_BITS = 32 - 1 - _LEADING  # a magnitude of 2^31 has 32 bits
NUM_SYMBOLS = 2 * ((_MOST_LOW_BITS + 1) << _LEADING)  # −2^31 has the last symbol


class Parts(NamedTuple):
    """Integers as symbols and bits.

    Attributes:
      symbols: numbers from 0 to NUM_SYMBOLS − 1.
      low: the bits that follow, as a number below 2 ** num_low_bits.
    """

    symbols: Int32[np.ndarray, "*shape"]
    low: UInt32[np.ndarray, "*shape"]


def split(values: Int32[np.ndarray, "*shape"]) -> Parts:
    """Splits integers."""
    magnitudes = np.abs(values.astype(np.int64))
    _, num_bits = np.frexp(magnitudes.astype(np.float64))
    num_low = np.maximum(num_bits - 1 - _LEADING, 0)
    buckets = (magnitudes >> num_low) + (num_low.astype(np.int64) << _LEADING)
    symbols = 2 * buckets - (values < 0)
    low = magnitudes & ((np.int64(1) << num_low) - 1)
    return Parts(symbols.astype(np.int32), low.astype(np.uint32))


def num_low_bits(symbols: Int32[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape"]:
    """Returns the number of bits that follow each symbol."""
    return np.maximum(((symbols + 1) >> (_LEADING + 1)) - 1, 0)


def join(parts: Parts) -> Int32[np.ndarray, "*shape"]:
    """Joins parts to integers again.

    Raises:
      ValueError: if a result is not an int32; `split` never makes such parts.
    """
    num_low = num_low_bits(parts.symbols).astype(np.int64)
    leading = ((parts.symbols.astype(np.int64) + 1) >> 1) - (num_low << _LEADING)
    magnitudes = (leading << num_low) + parts.low
    values = np.where(parts.symbols & 1, -magnitudes, magnitudes)
    if np.any(values != values.astype(np.int32)):
        raise ValueError("an integer has more than 32 bits")
    return values.astype(np.int32)
