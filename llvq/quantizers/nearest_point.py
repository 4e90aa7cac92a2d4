"""Finds nearest points of the lattices Z, A2, D_n, E8 and Leech, and their coordinates.

`nearest_z`, `nearest_a2`, `nearest_dn`, `nearest_e8` and `nearest_leech` map vectors [..., n] to
lattice points in the usual scaling (Conway & Sloane, Sphere Packings, Lattices and Groups). The
arithmetic is exact while no entry of a vector exceeds `LARGEST`; larger ones are clipped. Where two
points are equally near, either may come out.

`to_coordinates` and `from_coordinates` are inverse to each other: a lattice point is an integer
combination of the rows of a fixed basis.

The vectors' entries are handled as separate arrays, "planes": then a processor's vector unit works
on many vectors at once, where a reduction over 2 or 8 neighbouring entries would waste it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.quantizers import leech

LARGEST = 2**18
_DENOMINATOR = 8  # of the entries of the inverse of every basis below

Planes = Sequence[Array]


class Lattice(NamedTuple):
    """A lattice whose points are integer vectors times a step for each entry.

    Attributes:
      basis: [n, n], integers. The rows, times `step`, are a basis of the lattice.
      step: [n].
      nearest: maps vectors [..., n] to the nearest points.
      period: [n], the period of the lattice along each axis.
      second_moment: the mean squared error per entry of a uniform vector, for cells of volume 1
        (Conway & Sloane, table 2.3).
    """

    basis: np.ndarray
    step: np.ndarray
    nearest: Callable[[Float[Array, "... n"]], Float[Array, "... n"]]
    period: np.ndarray
    second_moment: float

    @property
    def dimension(self) -> int:
        """The number of entries of a vector."""
        return len(self.basis)

    @property
    def volume(self) -> float:
        """The volume of a cell."""
        return float(abs(np.linalg.det(self.basis)) * np.prod(self.step))


def to_coordinates(lattice: Lattice, points: Float[Array, "... n"]) -> Int[Array, "... n"]:
    """Returns the integer coordinates of lattice points in the basis; exact up to `LARGEST`."""
    integers = jnp.round(points / lattice.step.astype(points.dtype)).astype(jnp.int32)
    multiples = _DENOMINATOR * np.linalg.inv(lattice.basis)
    assert np.allclose(multiples, np.rint(multiples))
    planes = _combine(_planes(integers), np.rint(multiples).astype(int))
    return jnp.stack([plane // _DENOMINATOR for plane in planes], axis=-1)


def from_coordinates(
    lattice: Lattice, coordinates: Int[Array, "... n"], dtype: DTypeLike
) -> Float[Array, "... n"]:
    """Returns the lattice points with these coordinates in the basis."""
    return _to_points(to_integers(lattice, coordinates), lattice.step, dtype)


def to_integers(lattice: Lattice, coordinates: Int[Array, "... n"]) -> Int[Array, "... n"]:
    """Returns the points with these coordinates in the basis, in units of `lattice.step`."""
    return jnp.stack(_combine(_planes(coordinates), lattice.basis), axis=-1)


def nearest_z(vectors: Float[Array, "... 1"]) -> Float[Array, "... 1"]:
    """Finds the nearest integer."""
    return jnp.round(_clip(vectors))


def nearest_a2(vectors: Float[Array, "... 2"]) -> Float[Array, "... 2"]:
    """Finds the nearest point of the hexagonal lattice, spanned by (1, 0) and (1/2, √3/2)."""
    # It is a rectangular lattice and a copy of it in the middle of the rectangles.
    scale = 2 * A2.step.astype(vectors.dtype)
    first, second = (_clip(vectors[..., i]) / scale[i] for i in (0, 1))

    def candidate(shift: float) -> tuple[Array, list[Array]]:
        found = [jnp.round(first - shift) + shift, jnp.round(second - shift) + shift]
        return (first - found[0]) ** 2 + 3 * (second - found[1]) ** 2, found

    (distance, corner), (other_distance, middle) = candidate(0), candidate(0.5)
    integers = 2 * jnp.stack(_where(other_distance < distance, middle, corner), axis=-1)
    return _to_points(integers, A2.step, vectors.dtype)


def nearest_dn(vectors: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Finds the nearest point of D_n, the integer vectors whose sum is even.

    Conway & Sloane (1982): round every entry; if the sum is odd, round the entry with the largest
    error the other way.
    """
    planes = [_round(plane) for plane in _planes(vectors)]
    sizes = [plane.size for plane in planes]
    place = jnp.where(_is_odd(planes), _first(sizes, functools.reduce(jnp.maximum, sizes)), -1)
    rounded = _round(vectors)
    is_changed = place[..., None] == jnp.arange(len(planes))
    return rounded.integer + jnp.where(is_changed, rounded.sign, 0)


def nearest_e8(vectors: Float[Array, "... 8"]) -> Float[Array, "... 8"]:
    """Finds the nearest point of E8: of D8, or of D8 shifted by 1/2 in every entry.

    An entry with the error e from its integer has the error 1/2 − |e| from the half-integer next to
    it. So one rounding serves both.
    """
    planes = [_round(plane) for plane in _planes(vectors)]
    sizes = [plane.size for plane in planes]
    smallest, largest = (functools.reduce(f, sizes) for f in (jnp.minimum, jnp.maximum))
    is_odd = _is_odd(planes)
    shifted_is_odd = is_odd ^ (functools.reduce(jnp.multiply, [p.sign for p in planes]) < 0)
    # The squared distances of the two candidates, less what they have in common.
    distance = jnp.where(is_odd, 1 - 2 * largest, 0)
    shifted_distance = 2 - sum(sizes) + jnp.where(shifted_is_odd, 2 * smallest, 0)
    is_shifted = shifted_distance < distance
    place = _first(sizes, jnp.where(is_shifted, smallest, largest))
    is_wrong = jnp.where(is_shifted, shifted_is_odd, is_odd)
    # All in one integer, so that it is computed once for each vector: from 0 on, the entry that is
    # changed or none, then the same for the shifted lattice.
    choice = (jnp.where(is_wrong, place, 8) + jnp.where(is_shifted, 9, 0))[..., None]
    entries = jnp.arange(8)
    rounded = _round(vectors)
    shift = jnp.where(choice == 9 + entries, -0.5, jnp.where(choice >= 9, 0.5, 0.0))
    steps = jnp.where(choice == entries, 1.0, shift).astype(vectors.dtype)
    return rounded.integer + rounded.sign * steps


class _Rounded(NamedTuple):
    """The nearest integers of some values, and the signs and sizes of their errors."""

    integer: Array
    sign: Array
    size: Array


def _round(values: Array) -> _Rounded:
    values = _clip(values)
    integer = jnp.round(values)
    error = values - integer
    return _Rounded(integer, jnp.where(error < 0, -1, 1).astype(values.dtype), jnp.abs(error))


def _is_odd(planes: Sequence[_Rounded]) -> Bool[Array, "..."]:
    half = functools.reduce(jnp.add, [plane.integer for plane in planes]) / 2
    return half != jnp.round(half)


def _first(planes: Planes, value: Array) -> Int[Array, "..."]:
    """Returns the number of the first plane with this value."""
    number = jnp.zeros(value.shape, jnp.int32)
    for i, plane in reversed(list(enumerate(planes))):
        number = jnp.where(plane == value, i, number)
    return number


def nearest_leech(vectors: Float[Array, "... 24"]) -> Float[Array, "... 24"]:
    """Finds the nearest point of the Leech lattice; see `leech`."""
    scaled = _clip(vectors).reshape(-1, leech.LENGTH) / LEECH.step.astype(vectors.dtype)
    return _to_points(leech.nearest(scaled), LEECH.step, vectors.dtype).reshape(vectors.shape)


def _clip(vectors: Float[Array, "... n"]) -> Float[Array, "... n"]:
    return jnp.clip(vectors, -LARGEST, LARGEST)


def _planes(vectors: Array) -> list[Array]:
    return [vectors[..., i] for i in range(vectors.shape[-1])]


def _where(condition: Array, values: Sequence[Array], others: Sequence[Array]) -> list[Array]:
    pairs = zip(values, others, strict=True)
    return [jnp.where(condition, value, other) for value, other in pairs]


def _combine(planes: Planes, matrix: np.ndarray) -> list[Array]:
    """Multiplies the planes by an integer matrix."""
    return [
        functools.reduce(
            jnp.add, [int(factor) * planes[i] for i, factor in enumerate(column) if factor]
        )
        for column in matrix.T
    ]


def _to_points(
    integers: Array, step: Float[np.ndarray, "n"], dtype: DTypeLike
) -> Float[Array, "... n"]:
    return integers.astype(dtype) * step.astype(dtype)


def _through_last(first_row: Sequence[int], scale: int) -> np.ndarray:
    """Makes a basis of a given row, scale·(eᵢ + e_last) for each i, and 2·scale·e_last."""
    basis = scale * np.eye(len(first_row), dtype=int)
    basis[:, -1] = scale
    basis[-1, -1] = 2 * scale
    basis[0] = first_row
    return basis


def dn(dimension: int) -> Lattice:
    """Makes D_n, the integer vectors whose sum is even."""
    basis = _through_last([1, *[0] * (dimension - 2), 1], scale=1)
    second_moment = (1 / 12 + 1 / (2 * dimension * (dimension + 1))) / 2 ** (2 / dimension)
    return Lattice(basis, np.ones(dimension), nearest_dn, np.full(dimension, 2.0), second_moment)


Z = Lattice(np.ones((1, 1), int), np.ones(1), nearest_z, np.ones(1), 1 / 12)
A2 = Lattice(
    np.array([[2, 0], [1, 1]]),
    np.array([1 / 2, math.sqrt(3) / 2]),
    nearest_a2,
    np.array([1, math.sqrt(3)]),
    5 / (36 * math.sqrt(3)),
)
D4 = dn(4)
E8 = Lattice(
    _through_last([1] * 8, scale=2), np.full(8, 1 / 2), nearest_e8, np.full(8, 2.0), 929 / 12960
)
LEECH = Lattice(leech.BASIS, np.full(24, 8**-0.5), nearest_leech, np.full(24, 8**0.5), 0.0657710)
