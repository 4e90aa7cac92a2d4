"""FSQ, LFQ and BSQ against their papers' formulas in NumPy float64, and beside another program.

A float32 result may be off by 1e-6 of the reference's largest entry: 8 units in the last place,
which sums over some hundred terms and tanh stay within.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import BSQ, FSQ, LFQ
from llvq.quantizers.binary import entropy_of_mean

LEVELS = [(8, 5, 5, 5), (2, 3), (7, 6, 5, 4, 3, 2), (1000, 999)]


def assert_close(actual, desired, tolerance=1e-6):
    desired = np.asarray(desired, np.float64)
    error = np.abs(np.asarray(actual, np.float64) - desired).max()
    assert error <= tolerance * np.abs(desired).max()


def make_latents(dim, scale=1.0, seed=0, shape=(4, 6, 5)):
    return np.random.default_rng(seed).normal(0, scale, (*shape, dim)).astype(np.float32)


def gradient_of(quantizer, latents, weights=None):
    """The gradient by the latents of Σ weights·quantized + quantizer loss."""

    @jax.jit
    @jax.grad
    def grad(latents):
        quantized, _, loss, _ = call(quantizer, latents)
        return loss + (0.0 if weights is None else jnp.sum(weights * quantized))

    return grad(latents)


def call(quantizer, latents):
    """The quantizer, compiled as a whole, which takes less time than operation by operation."""
    return jax.jit(lambda latents: quantizer(latents))(latents)


# The formulas, in float64.


def fsq_bound(latents, levels):
    levels = np.array(levels)
    half_range = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    shift = np.tan(offset / half_range)
    bounded = np.tanh(latents + shift) * half_range - offset
    slope = half_range * (1 - np.tanh(latents + shift) ** 2)
    return bounded, slope


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def soft_assignments(latents, scale, temperature):
    """p(c|z) over all codes, [n, 2 ** bits], from distances to each of them."""
    codes = scale * np.array(list(itertools.product([-1, 1], repeat=latents.shape[-1])))
    distances = ((latents[:, None] - codes) ** 2).sum(-1)
    weights = np.exp(-(distances - distances.min(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def entropy(p, axis=-1):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis)


def bit_entropies(latents, scale, temperature):
    p = sigmoid(4 * scale * latents / temperature)
    return entropy(np.stack([p, 1 - p]), axis=0)


def numeric_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def penalty_gradient(latents, temperature):
    """The gradient of E[H(p(c|z))] − H(E[p(c|z)]) for the codes {±1}ᵈ."""
    bits = np.array(list(itertools.product([0, 1], repeat=latents.shape[-1])))
    p, count = soft_assignments(latents, 1.0, temperature), len(latents)
    logits = 4 * latents / temperature
    ones = sigmoid(logits)
    slopes = p[..., None] * (bits - ones[:, None])  # of p by the logits: [n, codes, bits]
    of_batch = np.einsum("c,ncb->nb", -np.log(np.maximum(p.mean(0), 1e-300)), slopes)
    return (-logits * ones * (1 - ones) - of_batch) / count * 4 / temperature


def test_the_oracles_gradient_is_the_oracles():
    latents = make_latents(3, shape=(7,)).astype(np.float64)

    def penalty(latents):
        p = soft_assignments(latents, 1.0, 0.7)
        return entropy(p).mean() - entropy(p.mean(0))

    assert_close(penalty_gradient(latents, 0.7), numeric_gradient(penalty, latents), 1e-8)


class TestFSQ:
    @pytest.mark.parametrize("levels", LEVELS)
    def test_against_the_paper(self, levels):
        latents, weights = make_latents(len(levels), 2.0), make_latents(len(levels), seed=1)
        bounded, slope = fsq_bound(latents.astype(np.float64), levels)
        is_clear = np.abs(bounded - np.floor(bounded) - 0.5) > 1e-3
        half_widths = np.array(levels) // 2

        quantizer = FSQ(levels)
        quantized, codes, loss, metrics = call(quantizer, latents)
        assert codes.dtype == jnp.int32
        desired = np.round(bounded)
        np.testing.assert_array_equal(
            np.where(is_clear, codes, 0), np.where(is_clear, desired + half_widths, 0)
        )
        assert_close(np.where(is_clear, quantized, 0), np.where(is_clear, desired / half_widths, 0))
        assert (loss, loss.dtype, metrics) == (0, jnp.float32, {})
        np.testing.assert_array_equal(quantizer.lookup(codes), quantized)
        # Straight through the rounding, but not through the bound.
        gradient = gradient_of(quantizer, latents, weights)
        assert_close(gradient, weights * slope / half_widths)

    @pytest.mark.parametrize("levels", LEVELS)
    def test_every_level_is_reached_and_none_beyond(self, levels):
        latents = np.linspace(-30, 30, 200_001, dtype=np.float32)[:, None].repeat(len(levels), 1)
        latents = np.concatenate([latents, np.full_like(latents[:1], np.inf), -1e30 + latents[:1]])
        codes = np.asarray(call(FSQ(levels), latents)[1])
        for entry, count in zip(codes.T, levels, strict=True):
            np.testing.assert_array_equal(np.unique(entry), np.arange(count))

    @pytest.mark.parametrize("levels", [(), (1, 5), (5, 1001), (4, 0), (4.5, 3), 5])
    def test_impossible_levels(self, levels):
        with pytest.raises(ValueError, match=r"levels=.*from 2 to 1000"):
            FSQ(levels)


class TestLFQ:
    @pytest.mark.parametrize(("codebook_size", "temperature"), [(256, 0.01), (256, 1.0), (2, 0.5)])
    def test_against_the_paper(self, codebook_size, temperature):
        bits = codebook_size.bit_length() - 1
        latents, weights = make_latents(bits), make_latents(bits, seed=1)
        quantizer = LFQ(codebook_size=codebook_size, temperature=temperature)
        quantized, codes, loss, metrics = call(quantizer, latents)
        np.testing.assert_array_equal(quantized, np.where(latents > 0, 1, -1))
        np.testing.assert_array_equal(codes, latents > 0)
        np.testing.assert_array_equal(quantizer.lookup(codes), quantized)

        flat = latents.reshape(-1, bits).astype(np.float64)
        p = soft_assignments(flat, 1.0, temperature)
        commitment = ((flat - np.sign(flat)) ** 2).mean()
        assert_close(metrics["commitment_loss"], commitment)
        assert_close(metrics["entropy"], entropy(p).mean())
        assert_close(metrics["batch_entropy"], entropy(p.mean(0)))
        penalty = entropy(p).mean() - entropy(p.mean(0))
        assert_close(loss, 0.25 * commitment + 0.1 * penalty)

        gradient = gradient_of(quantizer, latents)
        desired = 0.5 * (flat - np.sign(flat)) / flat.size
        desired += 0.1 * penalty_gradient(flat, temperature)
        assert_close(gradient, desired.reshape(gradient.shape))
        gradient = gradient_of(
            LFQ(codebook_size=codebook_size, entropy_weight=0.0), latents, weights
        )
        assert_close(gradient, weights + 0.5 * (latents - np.sign(latents)) / latents.size)

    def test_a_large_codebook_adds_up_the_bits(self):
        latents = make_latents(18)
        metrics = call(LFQ(codebook_size=2**18, temperature=1.0), latents).metrics
        flat = latents.reshape(-1, 18).astype(np.float64)
        p = sigmoid(4 * flat).mean(0)
        assert_close(metrics["entropy"], bit_entropies(flat, 1.0, 1.0).sum(-1).mean())
        assert_close(metrics["batch_entropy"], entropy(np.stack([p, 1 - p]), axis=0).sum())

    @pytest.mark.parametrize("codebook_size", [2, 2**13])
    def test_gradients_where_bits_are_biased(self, codebook_size):
        """A small probability of a bit keeps its digits."""
        bits = codebook_size.bit_length() - 1
        latents = np.random.default_rng(0).normal(-2, 0.3, (500, bits)).astype(np.float32)
        logits = 4 * latents.astype(float)
        ones, zeros = sigmoid(logits), sigmoid(-logits)
        penalty = functools.partial(entropy_of_mean, where=None, factorized=True)
        gradient = jax.jit(jax.grad(penalty))(4 * latents)
        odds = np.log(ones.mean(0)) - np.log(zeros.mean(0))
        assert_close(gradient, -odds * ones * zeros / len(latents))

    def test_zero_is_negative_as_in_the_paper(self):
        assert LFQ(codebook_size=2)(np.zeros((1, 1), np.float32))[0] == -1

    @pytest.mark.parametrize("size", [0, 1, 3, 1000, 1024.0])
    def test_impossible_sizes(self, size):
        with pytest.raises(ValueError, match=rf"codebook_size={size}: must be a power of two"):
            LFQ(codebook_size=size)


class TestBSQ:
    def test_against_the_paper(self):
        bits, temperature = 6, 0.3
        latents, weights = make_latents(bits), make_latents(bits, seed=1)
        quantizer = BSQ(num_bits=bits, temperature=temperature)
        quantized, codes, loss, metrics = call(quantizer, latents)
        scale = bits**-0.5
        exact = latents.reshape(-1, bits).astype(np.float64)

        def normalise(z):
            return z / np.linalg.norm(z, axis=-1, keepdims=True)

        def penalty(z):
            u = normalise(z)
            p = sigmoid(4 * scale * u / temperature).mean(0)
            of_batch = entropy(np.stack([p, 1 - p]), axis=0).sum()
            return 0.1 * (bit_entropies(u, scale, temperature).sum(-1).mean() - of_batch)

        assert_close(quantized, scale * np.sign(latents))
        assert_close(np.linalg.norm(quantized, axis=-1), np.ones(latents.shape[:-1]))
        np.testing.assert_array_equal(codes, latents >= 0)
        np.testing.assert_array_equal(quantizer.lookup(codes), quantized)
        p = soft_assignments(normalise(exact), scale, temperature)
        assert_close(metrics["entropy"], entropy(p).mean())
        # A difference of two nearly equal entropies: 1e-6 of these.
        error = abs(float(loss) - penalty(exact))
        assert error <= 1e-6 * 0.1 * entropy(p).mean()

        # Through the normalisation: the part of the weights that is tangent to the sphere.
        gradient = gradient_of(BSQ(num_bits=bits, entropy_weight=0.0), latents, weights)
        unit = normalise(latents.astype(np.float64))
        tangent = weights - unit * (unit * weights).sum(-1, keepdims=True)
        assert_close(gradient, tangent / np.linalg.norm(latents, axis=-1, keepdims=True))
        gradient = gradient_of(quantizer, latents[:1, :2])
        desired = numeric_gradient(penalty, exact[:10])
        assert_close(gradient, desired.reshape(gradient.shape))

    def test_zero_is_positive_as_in_the_paper(self):
        quantized, codes, *_ = call(BSQ(num_bits=4), np.zeros((1, 4), np.float32))
        np.testing.assert_array_equal(codes, np.ones((1, 4)))
        np.testing.assert_array_equal(quantized, np.full((1, 4), 0.5))
        gradient = jax.jit(jax.grad(lambda z: BSQ(num_bits=4)(z)[0].sum()))(
            np.zeros((1, 4), np.float32)
        )
        assert np.all(np.isfinite(gradient))

    def test_impossible_number_of_bits(self):
        with pytest.raises(ValueError, match="num_bits=0"):
            BSQ(num_bits=0)


@pytest.mark.parametrize(
    "quantizer",
    [FSQ((8, 8, 8, 8, 4, 4)), LFQ(codebook_size=2**16), BSQ(num_bits=16), FSQ((7, 6, 5))],
    ids=lambda quantizer: type(quantizer).__name__,
)
class TestAllCodes:
    def test_indices_round_trip_exhaustively(self, quantizer):
        indices = np.arange(quantizer.num_codes, dtype=np.int32)
        codes = quantizer.unflatten_codes(indices)
        assert len(np.unique(codes, axis=0)) == quantizer.num_codes
        assert np.all(np.asarray(codes) >= 0)
        assert np.all(np.asarray(codes) < quantizer.levels)
        np.testing.assert_array_equal(quantizer.codes_to_indices(codes), indices)
        # The first integer varies fastest.
        places = np.unravel_index(indices, quantizer.levels, order="F")
        np.testing.assert_array_equal(codes, np.stack(places, axis=-1))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_a_point_is_its_own_code(self, quantizer, dtype):
        """Also where latents are bfloat16: the points are far enough apart."""
        codes = quantizer.unflatten_codes(np.arange(quantizer.num_codes, dtype=np.int32))
        points = quantizer.lookup(codes)
        if isinstance(quantizer, FSQ):  # latents whose bounded values the points are
            levels = np.array(quantizer.levels)
            half_range, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2, 0, 0.5)
            inside = (np.asarray(points, float) * (levels // 2) + offset) / half_range
            points = np.arctanh(np.clip(inside, -0.9999, 0.9999)) - np.tan(offset / half_range)
        np.testing.assert_array_equal(call(quantizer, jnp.asarray(points, dtype))[1], codes)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0])
    def test_no_code_out_of_range_and_nan_shows(self, quantizer, value):
        latents = np.full((2, quantizer.latent_dim), value, np.float32)
        quantized, codes, *_ = call(quantizer, latents)
        assert np.all(np.asarray(codes) >= 0)
        assert np.all(np.asarray(codes) < quantizer.levels)
        assert np.all(np.isfinite(quantizer.lookup(codes)))
        assert np.all(np.isnan(quantized)) or not np.isnan(value)


def test_too_many_codes_for_an_index():
    for quantizer in (BSQ(num_bits=31), FSQ((1000,) * 4)):
        codes = np.zeros((3, quantizer.latent_dim), np.int32)
        with pytest.raises(ValueError, match=r"can index fewer than 2\*\*31"):
            quantizer.codes_to_indices(codes)
        with pytest.raises(ValueError, match=r"can index fewer than 2\*\*31"):
            quantizer.unflatten_codes(np.zeros(3, np.int32))
    assert BSQ(num_bits=30).codes_to_indices(np.ones((1, 30), np.int32)) == 2**30 - 1


def test_constructors_draw_nothing():
    for quantizer in (FSQ(), LFQ(), BSQ()):
        assert not jax.tree.leaves(nnx.state(quantizer))
