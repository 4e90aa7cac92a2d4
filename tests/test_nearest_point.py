"""Nearest lattice points against searches in NumPy float64 that share nothing with the code.

Where two points are equally near, either may come out: a point is right if it belongs to the
lattice and no other point is nearer by more than rounding.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from llvq.quantizers import leech
from llvq.quantizers.nearest_point import (
    A2,
    D4,
    E8,
    LARGEST,
    LEECH,
    dn,
    from_coordinates,
    nearest_dn,
    to_coordinates,
)

LATTICES = {"A2": A2, "D4": D4, "E8": E8, "Leech": LEECH}
DEEP_HOLES = {  # and points near the walls of cells, as offsets from a lattice point
    "A2": [[0.5, 1 / np.sqrt(12)]],
    "D4": [[1, 0, 0, 0], [0.5] * 4],
    "E8": [[1, *[0] * 7]],
}
# Squared distances are sums of up to 24 float32 numbers, of up to 2 in all.
TOLERANCE = float(24 * 2 * np.finfo(np.float32).eps)


@functools.cache
def nearest_points(name):
    return jax.jit(LATTICES[name].nearest)


def basis_of(lattice):
    return lattice.basis * lattice.step


def periods(lattice, num_points, seed=0):
    """Vectors that are uniform over whole cells, some lattice points away from 0."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-3, 3, (num_points, lattice.dimension)) @ basis_of(lattice)


def squared_distances(vectors, points):
    return np.sum((np.asarray(vectors, np.float64) - np.asarray(points, np.float64)) ** 2, axis=-1)


def least_a2(vectors):
    """Goes through the lattice points around each vector."""
    basis = np.array([[1, 0], [0.5, np.sqrt(0.75)]])
    corners = np.floor(vectors @ np.linalg.inv(basis))
    around = [
        squared_distances(vectors, (corners + offset) @ basis)
        for offset in itertools.product((-1, 0, 1, 2), repeat=2)
    ]
    return np.min(around, axis=0)


def least_dn(vectors):
    """Goes through the corners with an even sum of the unit cube around each vector.

    No other point of D_n is nearer: an entry outside the cube comes nearer by a step of 2, which
    keeps the sum even.
    """
    low = np.floor(vectors)
    corners = np.array(list(itertools.product((0, 1), repeat=vectors.shape[-1])))
    distances = (vectors - low) ** 2 @ (1 - corners).T + (vectors - low - 1) ** 2 @ corners.T
    is_odd = (low.sum(-1, keepdims=True) + corners.sum(-1)) % 2 == 1
    return np.where(is_odd, np.inf, distances).min(-1)


def least_e8(vectors):
    return np.minimum(least_dn(vectors), least_dn(vectors - 0.5))


LEAST = {"A2": least_a2, "D4": least_dn, "E8": least_e8}


def is_in(name, points):
    """Whether points belong to a lattice, by its definition."""
    if name == "A2":
        first = points[:, 0] - points[:, 1] / np.sqrt(3)
        return np.isclose(first, np.rint(first), atol=1e-4)
    if name == "Leech":
        integers = np.rint(points * np.sqrt(8)).astype(int)
        assert np.allclose(integers / np.sqrt(8), points, atol=1e-4)
        m = integers[:, :1] % 2
        words = (integers - m) // 2 % 2
        same = np.all(integers % 2 == m, axis=-1) & (integers.sum(-1) % 8 == 4 * m[:, 0])
        return same & np.all(words @ leech.GOLAY.reshape(-1, 24)[POWERS].T % 2 == 0, axis=-1)
    doubled = 2 * points
    assert np.all(doubled == np.rint(doubled))
    alike = np.all(doubled % 2 == (doubled[:, :1] % 2 if name == "E8" else 0), axis=-1)
    return alike & (points.sum(-1) % 2 == 0)


POWERS = [2**k * 16**i for i in range(3) for k in range(4)]  # words that span the code


def assert_nearest(name, vectors):
    vectors = np.asarray(vectors, np.float32)
    points = np.asarray(nearest_points(name)(vectors), np.float64)
    assert np.all(is_in(name, points))
    excess = squared_distances(vectors, points) - LEAST[name](vectors.astype(np.float64))
    # A point far from 0 is itself rounded.
    assert np.max(excess) < TOLERANCE + 4 * np.abs(points).max() * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("num_points", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_point_is_nearer(name, num_points):
    lattice = LATTICES[name]
    for part in range(0, num_points, 20_000):
        assert_nearest(name, periods(lattice, 20_000, seed=part))


@pytest.mark.parametrize("name", LEAST)
def test_on_and_next_to_the_walls_of_cells(name):
    lattice, rng = LATTICES[name], np.random.default_rng(1)
    coordinates = rng.integers(-3, 4, (2, 2_000, lattice.dimension))
    first, second = coordinates @ basis_of(lattice)
    walls = (first + second) / 2  # half-way between two points, and deep holes
    holes = np.concatenate([first + np.array(hole) for hole in DEEP_HOLES[name]])
    for on in (first, walls, holes):
        assert_nearest(name, on)
        for size in (1e-6, 1e-3):
            assert_nearest(name, on + size * rng.normal(size=on.shape))


@pytest.mark.parametrize("dimension", [2, 3, 7, 24])
def test_other_dimensions_of_dn(dimension):
    lattice = dn(dimension)
    vectors = periods(lattice, 100).astype(np.float32)
    points = np.asarray(nearest_dn(vectors))
    assert np.all(points == np.rint(points))
    assert np.all(points.sum(-1) % 2 == 0)
    if dimension < 10:
        excess = squared_distances(vectors, points) - least_dn(vectors.astype(np.float64))
        assert np.max(excess) < TOLERANCE
    back = from_coordinates(lattice, to_coordinates(lattice, points), np.float32)
    np.testing.assert_array_equal(back, points)


@pytest.mark.parametrize("name", LATTICES)
def test_coordinates_and_points_are_the_same_exactly(name):
    lattice = LATTICES[name]
    assert lattice.volume == pytest.approx({"A2": np.sqrt(0.75), "D4": 2}.get(name, 1))
    vectors = np.concatenate([periods(lattice, 500), 5_000 * periods(lattice, 500)])
    points = nearest_points(name)(vectors.astype(np.float32))
    coordinates = to_coordinates(lattice, points)
    assert coordinates.dtype == jnp.int32
    np.testing.assert_array_equal(from_coordinates(lattice, coordinates, np.float32), points)
    expected = np.asarray(coordinates, np.float64) @ basis_of(lattice)
    np.testing.assert_allclose(points, expected, rtol=1e-6, atol=1e-6)
    # Neighbours in the basis are lattice points of their own.
    unit = np.eye(lattice.dimension, dtype=np.int32)
    again = nearest_points(name)(from_coordinates(lattice, unit, np.float32))
    np.testing.assert_array_equal(to_coordinates(lattice, again), unit)


@pytest.mark.parametrize("name", LATTICES)
def test_every_vector_becomes_a_point(name):
    lattice = LATTICES[name]
    for value in (0.0, 1e30, -1e30, np.inf, -np.inf):
        points = np.asarray(
            nearest_points(name)(np.full((1, lattice.dimension), value, np.float32))
        )
        assert np.all(np.abs(points) <= 1.01 * LARGEST)
        assert np.all(is_in(name, points)) or name == "A2"  # whose points are rounded there
        coordinates = to_coordinates(lattice, jnp.asarray(points))
        back = from_coordinates(lattice, coordinates, np.float32)
        np.testing.assert_array_equal(back, points)
    assert nearest_points(name)(np.zeros((0, lattice.dimension), np.float32)).shape[0] == 0
    shape = 2, 3, lattice.dimension
    assert nearest_points(name)(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("name", LATTICES)
def test_double_precision(name):
    lattice = LATTICES[name]
    with jax.enable_x64(True):
        vectors = jnp.asarray(periods(lattice, 50))
        points = lattice.nearest(vectors)
        assert points.dtype == jnp.float64
        expected = np.asarray(to_coordinates(lattice, points)) @ basis_of(lattice)
    np.testing.assert_allclose(points, expected, rtol=1e-14, atol=1e-14)
    if name in LEAST:
        excess = squared_distances(vectors, points) - LEAST[name](np.asarray(vectors))
        assert np.max(excess) < 1e-13


def test_the_code_is_golays():
    """Up to the order of its entries, there is one linear code with these weights."""
    words = leech.GOLAY.reshape(-1, 24)
    weights, counts = np.unique(words.sum(-1), return_counts=True)
    assert dict(zip(weights.tolist(), counts.tolist(), strict=True)) == {
        0: 1,
        8: 759,
        12: 2576,
        16: 759,
        24: 1,
    }
    numbers = words @ (1 << np.arange(24))
    assert len(np.unique(numbers)) == 4096
    for power in POWERS:
        np.testing.assert_array_equal(np.sort(numbers ^ numbers[power]), np.sort(numbers))


def minimal_vectors():
    """[98280, 24]: the shortest vectors of the Leech lattice, one of each pair ±v."""
    words = leech.GOLAY.reshape(-1, 24)
    octads = [np.flatnonzero(word) for word in words if word.sum() == 8]
    signs = np.array([s for s in itertools.product((1, -1), repeat=8) if np.prod(s) == 1])
    eights = np.zeros((len(octads), len(signs), 24))
    for rows, octad in zip(eights, octads, strict=True):
        rows[:, octad] = 2 * signs
    ones = (1 - 2 * words)[:, None] * (1 - 4 * np.eye(24))
    pairs, unit = itertools.combinations(range(24), 2), 4 * np.eye(24)
    fours = [s * unit[i] + t * unit[j] for i, j in pairs for s in (1, -1) for t in (1, -1)]
    vectors = np.concatenate([eights.reshape(-1, 24), ones.reshape(-1, 24), fours]) / np.sqrt(8)
    first = np.take_along_axis(vectors, np.argmax(vectors != 0, axis=-1)[:, None], axis=-1)
    return vectors[first[:, 0] > 0]


@pytest.mark.parametrize("num_points", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_minimal_vector_leads_nearer(num_points):
    shortest = minimal_vectors()
    assert len(shortest) == 196_560 / 2
    assert np.all(is_in("Leech", shortest))
    np.testing.assert_allclose(np.sum(shortest**2, axis=-1), 4)
    vectors = periods(LEECH, num_points).astype(np.float32)
    points = np.asarray(nearest_points("Leech")(vectors), np.float64)
    assert np.all(is_in("Leech", points))
    errors = vectors - points
    assert np.sum(errors**2, axis=-1).max() <= 2 + TOLERANCE
    # |e − v|² < |e|² if and only if e·v > |v|²/2 = 2.
    for part in np.array_split(errors.astype(np.float32), max(1, num_points // 500)):
        assert np.abs(part @ shortest.T.astype(np.float32)).max() <= 2 + TOLERANCE


def sphere_decoder(vector, lower):
    """The least squared distance of a lattice point, by a depth-first search (Schnorr & Euchner).

    Args:
      vector: [n], in the coordinates in which the basis is triangular.
      lower: [n, n], the basis: row i has no entry after the ith.
    """
    best, n = np.inf, len(vector)

    def search(i, rest, distance):
        nonlocal best
        centre = rest[i] / lower[i, i]
        number = np.rint(centre)
        step = 1 if centre >= number else -1
        while True:
            total = distance + (rest[i] - number * lower[i, i]) ** 2
            if total >= best:
                return  # every further number is further away
            if i == 0:
                best = total
            else:
                search(i - 1, rest[:i] - number * lower[i, :i], total)
            number += step
            step = -step - (1 if step > 0 else -1)

    search(n - 1, vector, 0.0)
    return best


def reduced(basis):
    """A basis of short vectors, by Lenstra, Lenstra and Lovász's algorithm (1982)."""
    basis = basis.copy()
    k = 1
    while k < len(basis):
        for j in range(k - 1, -1, -1):
            _, factors = orthogonalise(basis)
            basis[k] -= np.rint(factors[k, j]) * basis[j]
        orthogonal, factors = orthogonalise(basis)
        lengths = np.sum(orthogonal**2, axis=-1)
        if lengths[k] >= (0.99 - factors[k, k - 1] ** 2) * lengths[k - 1]:
            k += 1
        else:
            basis[[k, k - 1]] = basis[[k - 1, k]]
            k = max(k - 1, 1)
    return basis


def orthogonalise(basis):
    q, r = np.linalg.qr(basis.T)
    return (q * np.diag(r)).T, (r / np.diag(r)[:, None]).T


@pytest.mark.parametrize("num_points", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_against_a_sphere_decoder(num_points):
    basis = reduced(basis_of(LEECH))
    np.testing.assert_allclose(np.sum(basis**2, axis=-1).max(), 4)
    q, r = np.linalg.qr(basis.T)
    vectors = periods(LEECH, num_points, seed=2).astype(np.float32)
    points = nearest_points("Leech")(vectors)
    for vector, distance in zip(vectors, squared_distances(vectors, points), strict=True):
        assert distance == pytest.approx(sphere_decoder(vector @ q, r.T), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "num_points"),
    [
        *itertools.product(LATTICES, [10_000]),
        *(pytest.param(name, 10_000_000, marks=pytest.mark.slow) for name in LEAST),
        pytest.param("Leech", 1_000_000, marks=pytest.mark.long),
    ],
)
def test_second_moments_are_those_of_the_literature(name, num_points):
    lattice = LATTICES[name]
    unit = lattice.dimension * lattice.volume ** (2 / lattice.dimension)
    total = squares = 0.0
    part_size = min(num_points, 500_000)
    for part in range(num_points // part_size):
        vectors = periods(lattice, part_size, seed=part).astype(np.float32)
        values = squared_distances(vectors, nearest_points(name)(vectors)) / unit
        total += values.sum()
        squares += (values**2).sum()
    mean = total / num_points
    error = np.sqrt((squares / num_points - mean**2) / num_points)
    assert abs(mean - lattice.second_moment) < 3 * error
