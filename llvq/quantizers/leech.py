"""The Leech lattice times √8: a basis, and the search for nearest points.

Its points are the integer vectors x for which, with m = 0 or 1,

    x ≡ m + 2c (mod 4), where c is a word of the Golay code, and Σx ≡ 4m (mod 8)

(Conway & Sloane, Sphere Packings, Lattices and Groups, chapter 4). The Golay code is Turyn's: its
words are (a + x, b + x, a + b + x), with a and b of the Hamming code [8, 4] and x of the same code
backwards.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

LENGTH = 24
_SECTION = 8
_BLOCK_SIZE = 64  # vectors searched at once


def _span(generators: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the words of a code; word i is the sum of the generators that i's bits name."""
    bits = np.arange(2 ** len(generators))[:, None] >> np.arange(len(generators)) & 1
    return bits @ np.array(generators) % 2


def _hamming(polynomial: Sequence[int]) -> np.ndarray:
    """Returns the words of a cyclic code of length 7, each with a parity bit."""
    rows = [[0] * shift + [*polynomial] + [0] * (3 - shift) for shift in range(4)]
    return _span([[*row, sum(row) % 2] for row in rows])


_A, _X = _hamming((1, 1, 0, 1)), _hamming((1, 0, 1, 1))


def _golay() -> np.ndarray:
    """Returns the words of the Golay code by x, a and b: [16, 16, 16, 24]."""
    x, a, b = _X[:, None, None], _A[None, :, None], _A[None, None]
    sections = np.broadcast_arrays(a + x, b + x, a + b + x)
    return np.concatenate(sections, axis=-1) % 2


GOLAY = _golay()


def _make_basis() -> np.ndarray:
    """Returns a basis, [24, 24]; each row is a basis vector."""
    # Bring twelve words that span the code into reduced echelon form.
    words = GOLAY.reshape(-1, LENGTH)
    rows: list[np.ndarray] = []
    pivots: list[int] = []
    for word in words[[2**k * 16**i for i in range(3) for k in range(4)]]:
        for row, pivot in zip(rows, pivots, strict=True):
            word = word ^ (row * word[pivot])
        pivot = int(np.argmax(word))
        rows = [row ^ (word * row[pivot]) for row in rows]
        rows.append(word)
        pivots.append(pivot)
    last = max(set(range(LENGTH)) - set(pivots))
    unit = np.eye(LENGTH, dtype=int)
    odd = 1 - 4 * unit[last]
    others = [4 * (unit[i] + unit[last]) for i in range(LENGTH) if i not in (*pivots, last)]
    return np.stack([odd, *(2 * row for row in rows[1:]), *others, 8 * unit[last]])


def nearest(vectors: Float[Array, "n 24"]) -> Float[Array, "n 24"]:
    """Finds the nearest points by a search of all words of the Golay code, in bounded memory."""
    num_blocks = -(-len(vectors) // _BLOCK_SIZE)
    padded = jnp.pad(vectors, ((0, num_blocks * _BLOCK_SIZE - len(vectors)), (0, 0)))
    points = jax.lax.map(_nearest, padded.reshape(num_blocks, _BLOCK_SIZE, LENGTH))
    return points.reshape(-1, LENGTH)[: len(vectors)]


def _nearest(vectors: Float[Array, "n 24"]) -> Float[Array, "n 24"]:
    """Finds the nearest points of a block.

    A word and m fix the residue of each entry modulo 4, and so the two nearest integers. The sum is
    right if an even number of entries (for m = 1, an odd one) is an odd multiple of 4 from its
    residue. If not, one entry has to take its second choice. Each section may do so by itself: what
    it costs for either parity adds up over the sections, and one second choice is always enough.
    """
    costs = _section_costs(vectors)

    def search(best: tuple[Array, Array], m_and_x: Array) -> tuple[tuple[Array, Array], None]:
        m, x = jnp.divmod(m_and_x, len(_X))
        first, second, third = jnp.moveaxis(costs[m, jnp.asarray(_PATTERNS)[x]], 0, 2)
        total = jnp.min(_least_sums(first, second) + third, axis=0)
        cost = jnp.min(total, axis=0)
        numbers = m_and_x * len(_A) + jnp.arange(len(_A), dtype=jnp.int32)[:, None]
        number = jnp.min(jnp.where(total > cost, 2**30, numbers), axis=0)
        is_better = cost < best[0]
        return jax.tree.map(functools.partial(jnp.where, is_better), (cost, number), best), None

    nothing = jnp.full(len(vectors), jnp.inf, vectors.dtype), jnp.zeros(len(vectors), jnp.int32)
    (_, number), _ = jax.lax.scan(search, nothing, jnp.arange(2 * len(_X), dtype=jnp.int32))

    # One of 16 words is left for each vector.
    m, x_and_sum = jnp.divmod(number, len(_X) * len(_A))
    m = m[:, None, None]
    residues = m + 2 * jnp.asarray(_BY_SUM, jnp.int32)[x_and_sum]
    multiples, errors = _in_class(vectors[:, None], residues)
    sizes = jnp.abs(errors)
    is_wrong = (jnp.sum(_parity(multiples), axis=-1, keepdims=True) + m) % 2 == 1
    is_changed = jnp.arange(LENGTH) == jnp.argmax(sizes, axis=-1, keepdims=True)
    change = jnp.where(is_wrong & is_changed, jnp.where(errors < 0, -1, 1), 0)
    nearest = jnp.argmin(jnp.sum((errors - 4 * change) ** 2, axis=-1), axis=-1)
    points = residues + 4 * (multiples + change)
    return jnp.take_along_axis(points, nearest[:, None, None], axis=1)[:, 0]


BASIS = _make_basis()
# [16, 16]: the number of the section a + x among the patterns of 8 bits, by x and a.
_PATTERNS = (_X[:, None] ^ _A[None]) @ (1 << np.arange(_SECTION))
# [256, 16, 24]: the words of the Golay code by x and a + b, then by a.
_NUMBERS = np.arange(len(_A))
_BY_SUM = GOLAY[:, _NUMBERS, _NUMBERS[:, None] ^ _NUMBERS].reshape(-1, len(_A), LENGTH)


def _least_sums(
    first: Float[Array, "2 16 n"], second: Float[Array, "2 16 n"]
) -> Float[Array, "2 16 n"]:
    """Finds the least first[i, a] + second[j, b] for each i + j (mod 2) and each sum a + b."""
    seconds = second.reshape(2, *[2] * 4, -1)
    least = []
    for parity in (0, 1):
        sums = []
        for a, i in itertools.product(range(len(_A)), (0, 1)):
            # Adding a to all b reverses the axes of the bits that a has.
            axes = [3 - bit for bit in range(4) if a >> bit & 1]
            sums.append(first[i, a] + jnp.flip(seconds[i ^ parity], axes))
        least.append(functools.reduce(jnp.minimum, sums))
    return jnp.stack(least).reshape(second.shape)


def _section_costs(vectors: Float[Array, "n 24"]) -> Float[Array, "2 256 3 2 n"]:
    """Returns each section's cost by m, pattern of bits, section and parity of the multiples of 4.

    For m = 1 the third section's parities are exchanged, so that all three have to add up to 0.
    """
    residues = jnp.array([[0, 2], [1, 3]])[:, :, None, None, None]  # by m and bit
    multiples, errors = _in_class(vectors.T.reshape(3, _SECTION, -1), residues)

    def combine(add: Callable[[Array, Array], Array], terms: Array) -> Array:
        # Four entries at a time: one axis for the bit of each, the last entry's first.
        half = _SECTION // 2
        halves = []
        for first in (0, half):
            axes = [[1 + j for j in range(half) if j != half - 1 - i] for i in range(half)]
            each = [jnp.expand_dims(terms[:, :, :, first + i], axes[i]) for i in range(half)]
            halves.append(functools.reduce(add, each).reshape(2, 2**half, 3, -1))
        low, high = jax.lax.optimization_barrier(halves)
        return add(high[:, :, None], low[:, None])

    exchanged = jnp.zeros((2, 1, 1, 3, 1), jnp.int32).at[1, :, :, 2].set(1)
    parity = combine(jnp.bitwise_xor, _parity(multiples)) ^ exchanged
    # (4 − e)² − e² = 16 − 8e: the cost of the second choice where the error e is largest.
    change = 16 - 8 * combine(jnp.maximum, jnp.abs(errors))
    cost = combine(jnp.add, errors**2)
    costs = jnp.stack([cost + jnp.where(parity == q, 0, change) for q in (0, 1)], axis=-2)
    return costs.reshape(2, 2**_SECTION, 3, 2, -1)


def _in_class(values: Array, residues: Array | int) -> tuple[Array, Array]:
    """Returns (the multiples of 4 that bring the residues nearest to the values, the errors)."""
    multiples = jnp.round((values - residues) / 4)
    return multiples, values - residues - 4 * multiples


def _parity(integers: Array) -> Int[Array, "..."]:
    return integers.astype(jnp.int32) & 1
