"""SimVQ, residual VQ and the options of VQ and VQ-EMA against NumPy in float64.

Tolerances are as in test_scalar_quantizers.py.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import VQ, VQEMA, ResidualVQ, SimVQ
from llvq.quantizers import codebook as codebooks
from llvq.quantizers import codebook_search
from tests.test_quantizers import grads_of, latents_near, nearest_in_float64
from tests.test_scalar_quantizers import assert_close, make_latents

DIM, SIZE = 8, 16
KEY = jax.random.key(0)
LEARNED = (VQ, VQEMA)


def make(kind, **options):
    return kind(DIM, codebook_size=SIZE, rngs=nnx.Rngs(1), **options)


@pytest.fixture
def codebook():
    return 3.0 * np.random.default_rng(5).normal(size=(SIZE, DIM)).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rotation(start, end):
    """The rotation in the plane of two unit vectors that takes one to the other."""
    cosine = start @ end
    across = (end - cosine * start) / np.linalg.norm(end - cosine * start)
    plane = np.stack([start, across], axis=1)
    sine = across @ end
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return np.eye(len(start)) + plane @ (turn - np.eye(2)) @ plane.T


@pytest.mark.parametrize("kind", LEARNED)
def test_rotation_trick(kind, codebook):
    """The gradient by the latents is that of λ·R·z, with each latent's own λ and R."""
    quantizer = make(kind, gradient="rotation", commitment_cost=0.0)
    quantizer.codebook[...] = jnp.asarray(codebook)
    latents, weights = latents_near(codebook), make_latents(DIM, seed=7, shape=(4, 3, 5))
    codes = nearest_in_float64(latents, codebook)
    quantized, actual_codes, *_ = quantizer(latents)
    np.testing.assert_array_equal(actual_codes, codes)
    np.testing.assert_array_equal(quantized, codebook[codes])

    by_parameters, by_latents = grads_of(quantizer, latents, weights)
    desired = np.zeros(latents.shape)
    for place in np.ndindex(*codes.shape):
        z, q = latents[place].astype(float), codebook[codes[place]].astype(float)
        matrix = np.linalg.norm(q) / np.linalg.norm(z) * rotation(unit(z), unit(q))
        assert_close(matrix @ z, q, 1e-12)
        desired[place] = matrix.T @ weights[place]
    assert_close(by_latents, desired)
    # Nothing but the codebook loss reaches the codebook.
    plain = make(kind, commitment_cost=0.0)
    plain.codebook[...] = jnp.asarray(codebook)
    jax.tree.map(assert_close, by_parameters, grads_of(plain, latents, weights)[0])


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (0.0, 0.0)])
def test_rotation_of_degenerate_vectors_is_finite(start, end):
    latents, quantized = jnp.full((1, DIM), start), jnp.full((1, DIM), end)
    np.testing.assert_array_equal(codebooks.rotate(quantized, latents), quantized)
    gradient = jax.grad(lambda z: codebooks.rotate(quantized, z).sum())(latents)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("kind", LEARNED)
def test_cosine_distance(kind, codebook):
    quantizer = make(kind, distance="cosine")
    quantizer.codebook[...] = jnp.asarray(codebook)
    latents = latents_near(codebook) * np.float32(7.0)
    weights = make_latents(DIM, seed=7, shape=(4, 3, 5))
    points, exact = unit(codebook.astype(float)), unit(latents.astype(float))
    codes = (exact @ points.T).argmax(-1)

    quantized, actual_codes, _, metrics = quantizer(latents)
    np.testing.assert_array_equal(actual_codes, codes)
    assert_close(quantized, points[codes])
    np.testing.assert_array_equal(quantizer.lookup(actual_codes), quantized)
    difference = points[codes] - exact
    assert_close(metrics["commitment_loss"], (difference**2).mean())

    def tangent(gradient, vectors):
        """Propagates a gradient through the normalization."""
        of_unit = unit(vectors.astype(float))
        along = (of_unit * gradient).sum(-1, keepdims=True)
        return (gradient - along * of_unit) / np.linalg.norm(vectors, axis=-1, keepdims=True)

    by_parameters, by_latents = grads_of(quantizer, latents, weights)
    assert_close(by_latents, tangent(weights - 0.5 * difference / latents.size, latents))
    if kind is VQ:
        desired = np.zeros_like(codebook, float)
        np.add.at(desired, codes, 2 * difference / latents.size)
        assert_close(by_parameters["codebook"][...], tangent(desired, codebook))


def lloyd(latents, centres, iterations):
    for _ in range(iterations):
        codes = ((latents[:, None] - centres) ** 2).sum(-1).argmin(-1)
        for code in np.unique(codes):
            centres[code] = latents[codes == code].mean(0)
    return centres


@pytest.mark.parametrize("kind", LEARNED)
def test_initialization_from_the_first_batch(kind, codebook):
    latents = latents_near(codebook)
    mask = np.array([True, False, True, True])
    counted = latents[mask].reshape(-1, DIM)
    quantizer = make(kind, initialization="batch", restart_threshold=0.0)
    before = np.array(quantizer.codebook[...])
    quantizer(latents)  # evaluation changes nothing
    np.testing.assert_array_equal(quantizer.codebook[...], before)
    with pytest.raises(ValueError, match="initialization='batch' needs a key"):
        quantizer(latents, train=True)
    quantizer(latents, train=True, mask=np.zeros(4, bool), key=KEY)
    assert not quantizer.is_initialised[...], "a batch without examples is no first one"
    np.testing.assert_array_equal(quantizer.codebook[...], before)
    quantized, codes, *_ = quantizer(latents, train=True, mask=mask, key=KEY)

    start = np.array(codebooks.draw(jnp.asarray(latents), mask, KEY, SIZE, distinct=True))
    places = (start[:, None] == counted).all(-1)
    assert places.any(1).all(), "drawn from the images that count"
    assert len(np.unique(places.argmax(1))) == SIZE, "each once"
    centres = lloyd(counted.astype(float), start.astype(float), 10)
    if kind is VQ:
        assert_close(quantizer.codebook[...], centres)
    assert_close(quantized, centres[nearest_in_float64(latents, centres)])
    np.testing.assert_array_equal(codes, nearest_in_float64(latents, centres))
    # The second batch finds a codebook.
    after = np.array(quantizer.codebook[...])
    quantized, codes, *_ = quantizer(latents + 1, train=True, mask=mask, key=KEY)
    np.testing.assert_array_equal(quantized, after[codes])


def test_the_gradient_passes_the_initialization():
    quantizer = make(VQ, initialization="batch")
    latents = make_latents(DIM)

    def loss_fn(quantizer):
        return quantizer(latents, train=True, key=KEY).metrics["codebook_loss"]

    gradient = nnx.grad(loss_fn)(quantizer)["codebook"][...]
    codes = np.asarray(quantizer(latents)[1])
    difference = np.asarray(quantizer.codebook[...])[codes] - latents
    desired = np.zeros((SIZE, DIM))
    np.add.at(desired, codes, 2 * difference / latents.size)
    # Near a minimum of k-means the gradient is a sum of terms that cancel.
    error = np.abs(gradient - desired).max()
    assert error < 1e-6 * np.abs(2 * difference / latents.size).sum()


@pytest.mark.parametrize("kind", LEARNED)
def test_dead_codes_restart_from_the_batch(kind, codebook):
    threshold = 0.5
    quantizer = make(kind, restart_threshold=threshold)
    codebook[3] = codebook[11] = 1e3  # nothing is near
    quantizer.codebook[...] = jnp.asarray(codebook)
    if kind is VQEMA:
        quantizer.ema_sum[...] = jnp.asarray(codebook)
        quantizer.cluster_size[...] = jnp.ones(SIZE)
    size = np.array(quantizer.cluster_size[...], float)
    rng = np.random.default_rng(0)
    chosen = np.resize([code for code in range(SIZE) if code not in (3, 11)], (4, 3, 5))
    latents = (codebook[chosen] + rng.normal(0, 0.1, (4, 3, 5, DIM))).astype(np.float32)
    mask = np.array([True, True, True, False])
    with pytest.raises(ValueError, match="restart_threshold above 0 needs a key"):
        make(kind, restart_threshold=threshold)(latents, train=True)
    quantized, *_ = quantizer(latents, train=True, mask=mask, key=KEY)
    np.testing.assert_array_equal(quantized, codebook[chosen])  # the codebook of before

    counts = np.bincount(chosen[mask].ravel(), minlength=SIZE)
    size = 0.99 * size + 0.01 * counts
    if kind is VQEMA:
        total = size.sum()
        size = (size + 1e-5) / (total + SIZE * 1e-5) * total
    is_dead = size < threshold * size.mean()
    if kind is VQ:
        np.testing.assert_array_equal(np.flatnonzero(is_dead), [3, 11])
        kept = codebook
    else:
        sums = np.zeros((SIZE, DIM))
        np.add.at(sums, chosen[mask].ravel(), latents[mask].reshape(-1, DIM).astype(float))
        kept = (0.99 * codebook + 0.01 * sums) / size[:, None]
        assert not is_dead.any(), "a moving average outlives one batch"
    after = np.array(quantizer.codebook[...])
    assert_close(after[~is_dead], kept[~is_dead])
    counted = latents[mask].reshape(-1, DIM)
    for vector in after[is_dead]:
        assert (counted == vector).all(-1).any()
    assert_close(quantizer.cluster_size[...], np.where(is_dead, size.mean(), size))


def test_a_dead_code_of_moving_averages_restarts():
    quantizer = make(VQEMA, restart_threshold=0.5)
    quantizer.cluster_size[...] = jnp.where(jnp.arange(SIZE) == 3, 1e-3, 1.0)
    quantizer.codebook[...] = quantizer.codebook[...].at[3].set(1e3)
    latents = make_latents(DIM)
    quantizer(latents, train=True, key=KEY)
    vector = np.array(quantizer.codebook[...])[3]
    assert (latents.reshape(-1, DIM) == vector).all(-1).any()
    size = quantizer.cluster_size[...]
    assert size[3] == pytest.approx(float(jnp.mean(jnp.delete(size, 3))), rel=0.1)
    # The sum agrees with vector and count, so that the next update moves it little.
    assert_close(quantizer.ema_sum[...][3], vector * float(size[3]))


@pytest.mark.parametrize("kind", LEARNED)
def test_nothing_restarts_from_what_does_not_count(kind):
    quantizer = make(kind, restart_threshold=0.9)
    quantizer.cluster_size[...] = jnp.arange(SIZE, dtype=np.float32)
    before = np.array(quantizer.codebook[...])
    if kind is VQEMA:
        quantizer.ema_sum[...] = before * np.arange(SIZE, dtype=np.float32)[:, None]
    latents = np.full((4, 3, DIM), 77.0, np.float32)
    quantizer(latents, train=True, mask=np.zeros(4, bool), key=KEY)
    assert np.abs(quantizer.codebook[...]).max() < 10
    if kind is VQ:
        np.testing.assert_array_equal(quantizer.codebook[...], before)


@pytest.mark.parametrize(
    ("construct", "words"),
    [
        (lambda: make(VQ, gradient="rotate"), "gradient='rotate': must be one of"),
        (lambda: make(VQEMA, distance="cos"), "distance='cos': must be one of"),
        (lambda: make(VQ, initialization="kmeans"), "initialization='kmeans'"),
        (lambda: make(VQ, restart_threshold=2), "restart_threshold=2: .* from 0 to 1"),
        (lambda: VQ(DIM, codebook_size=0, rngs=nnx.Rngs(0)), "codebook_size=0"),
        (lambda: make(ResidualVQ, stage="pq"), "stage='pq': must be one of vq, vq_ema, simvq"),
        (lambda: make(ResidualVQ, depth=0), "depth=0: must be an integer from 1"),
    ],
)
def test_impossible_options(construct, words):
    with pytest.raises(ValueError, match=words):
        construct()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("codebook_size", [5, 2100])  # in one block, and in several
def test_each_platforms_sums_by_code(platform, codebook_size, monkeypatch):
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *arguments, cpu, default: (cpu if platform == "cpu" else default)(*arguments),
    )
    rng = np.random.default_rng(0)
    codes = rng.integers(codebook_size, size=(6, 50))
    values = rng.normal(size=(6, 50, 3))
    expected = np.zeros((codebook_size, 3))
    np.add.at(expected, codes, values)
    for num_shares in (1, 2):
        sums = codebook_search.sums_by_code(
            jnp.asarray(codes, jnp.int32),
            jnp.asarray(values, jnp.float32),
            codebook_size,
            num_shares,
        )
        assert_close(sums, expected)


def test_draws_are_uniform_over_what_counts():
    latents = jnp.arange(24, dtype=np.float32).reshape(6, 2, 2, 1)
    mask = np.array([False, True, True, False, False, True])
    counted = np.ravel(latents[mask])
    for distinct in (False, True):
        draw = functools.partial(codebooks.draw, latents, mask, count=12, distinct=distinct)
        draws = jax.vmap(lambda key, draw=draw: draw(key=key))(jax.random.split(KEY, 300))
        values, counts = np.unique(draws, return_counts=True)
        np.testing.assert_array_equal(values, counted)
        # 3,600 draws of 12 values: 5 standard deviations of √(300·11/12).
        assert np.abs(counts - 300).max() <= (0 if distinct else 5 * np.sqrt(300 * 11 / 12))


class TestSimVQ:
    def test_against_the_paper(self):
        quantizer = make(SimVQ)
        coefficients = np.asarray(quantizer.coefficients[...], float)
        basis = np.asarray(quantizer.basis[...], float)
        points = coefficients @ basis
        latents, weights = latents_near(4 * points), make_latents(DIM, seed=7, shape=(4, 3, 5))
        quantizer.basis[...] *= 4
        points, basis = 4 * points, 4 * basis
        exact = latents.astype(float)
        codes = ((exact[..., None, :] - points) ** 2).sum(-1).argmin(-1)
        quantized, actual_codes, loss, _ = quantizer(latents)
        np.testing.assert_array_equal(actual_codes, codes)
        assert_close(quantized, points[codes])
        np.testing.assert_array_equal(quantizer.lookup(actual_codes), quantized)
        difference = points[codes] - exact
        assert_close(loss, 1.25 * (difference**2).mean())
        by_parameters, by_latents = grads_of(quantizer, latents, weights)
        assert_close(by_latents, weights - 0.5 * difference / latents.size)
        of_points = np.zeros_like(points)
        np.add.at(of_points, codes, 2 * difference / latents.size)
        assert_close(by_parameters["basis"][...], coefficients.T @ of_points)

    def test_training_leaves_the_coefficients_alone_and_starts_as_said(self):
        quantizer = SimVQ(64, codebook_size=4096, rngs=nnx.Rngs(0))
        assert set(nnx.to_pure_dict(nnx.state(quantizer, nnx.Param))) == {"basis"}
        assert np.std(quantizer.coefficients[...]) == pytest.approx(1 / 8, rel=0.01)
        assert 0.999 / 8 < np.abs(quantizer.basis[...]).max() <= 1 / 8


class TestResidualVQ:
    @pytest.mark.parametrize("stage", ["vq", "vq_ema", "simvq"])
    def test_against_numpy(self, stage):
        depth = 3
        quantizer = ResidualVQ(
            DIM, depth=depth, codebook_size=SIZE, stage=stage, dropout=False, rngs=nnx.Rngs(0)
        )
        for index, part in enumerate(quantizer.stages):
            if stage != "simvq":
                part.codebook[...] = part.codebook[...] * (SIZE if stage == "vq" else 1) / 2**index
        latents, weights = make_latents(DIM), make_latents(DIM, seed=7)
        residual, total, loss, desired = latents.astype(float), 0.0, 0.0, weights.astype(float)
        codes, by_stage = [], []
        for part in quantizer.stages:
            points = np.asarray(part.points(), float)
            code = ((residual[..., None, :] - points) ** 2).sum(-1).argmin(-1)
            difference = points[code] - residual
            loss += (0.25 if stage == "vq_ema" else 1.25) * (difference**2).mean()
            desired = desired - 0.5 * difference / latents.size
            gradient = np.zeros_like(points)
            np.add.at(gradient, code, 2 * difference / latents.size)
            by_stage.append(gradient)
            codes.append(code)
            total, residual = total + points[code], residual - points[code]

        quantized, actual_codes, actual_loss, _ = quantizer(latents)
        np.testing.assert_array_equal(actual_codes, np.stack(codes, -1))
        assert_close(quantized, total)
        assert_close(actual_loss, loss)
        np.testing.assert_array_equal(quantizer.lookup(actual_codes), quantized)
        for stages in range(1, depth):
            points = [
                np.asarray(part.points(), float)[c]
                for part, c in zip(quantizer.stages[:stages], codes, strict=False)
            ]
            assert_close(quantizer.lookup(actual_codes[..., :stages]), sum(points))
        # Straight through once, however deep it is; each stage adds its commitment.
        by_parameters, by_latents = grads_of(quantizer, latents, weights)
        assert_close(by_latents, desired)
        if stage == "vq":
            for index, gradient in enumerate(by_stage):
                assert_close(by_parameters["stages"][index]["codebook"][...], gradient)

    def test_dropout_leaves_out_the_last_stages(self):
        quantizer = ResidualVQ(
            DIM,
            depth=4,
            codebook_size=SIZE,
            stage="vq",
            restart_threshold=0.0,
            initialization="random",
            rngs=nnx.Rngs(0),
        )
        latents = make_latents(DIM, shape=(400, 2))
        with pytest.raises(ValueError, match="dropout=True needs a key"):
            quantizer(latents, train=True)
        quantized, codes, actual_loss, _ = quantizer(latents, train=True, key=KEY)
        codes = np.asarray(codes)
        num_stages = (codes >= 0).sum(-1)
        assert (num_stages == num_stages[:, :1]).all(), "an example has one number"
        np.testing.assert_array_equal(codes >= 0, np.arange(4) < num_stages[..., None])
        counts = np.bincount(num_stages[:, 0], minlength=5)
        # 400 draws of 4 values: 5 standard deviations of √(400·3/16).
        assert counts[0] == 0
        assert np.abs(counts[1:] - 100).max() < 5 * np.sqrt(75)
        np.testing.assert_array_equal(quantizer.lookup(codes), quantized)
        all_codes = quantizer(latents)[1]
        np.testing.assert_array_equal(np.where(codes >= 0, all_codes, -1), codes)
        # A stage's loss is the mean over the examples that use it.
        residual, loss = latents.astype(float), 0.0
        for index, part in enumerate(quantizer.stages):
            uses = num_stages[:, 0] > index
            points = np.asarray(part.points(), float)[np.asarray(all_codes)[..., index]]
            loss += 1.25 * ((points - residual)[uses] ** 2).mean()
            residual = residual - points
        assert_close(actual_loss, loss)

    @pytest.mark.parametrize("stage", ["vq", "vq_ema"])
    def test_a_stage_that_no_example_uses_stays_sound(self, stage):
        latents = make_latents(DIM, shape=(1, 3))

        def loss_fn(quantizer, latents, key):
            quantized, codes, loss, _ = quantizer(latents, train=True, key=key)
            return jnp.sum(quantized) + loss, codes

        grad = nnx.jit(nnx.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
        for key in map(jax.random.key, range(99)):
            quantizer = ResidualVQ(DIM, depth=2, codebook_size=4, stage=stage, rngs=nnx.Rngs(0))
            (value, codes), gradients = grad(quantizer, latents, key)
            if codes[0, 0, 1] == -1:
                break
        assert codes[0, 0, 1] == -1, "no key left the last stage out of the first batch"
        for leaf in jax.tree.leaves((value, gradients, nnx.state(quantizer))):
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("kind", [*LEARNED, SimVQ, ResidualVQ])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 0.0])
def test_no_index_out_of_range_and_nan_shows(kind, value):
    quantizer = make(kind)
    quantized, codes, *_ = quantizer(np.full((2, 3, DIM), value, np.float32))
    assert np.all(np.asarray(codes) >= 0)
    assert np.all(np.asarray(codes) < SIZE)
    assert np.all(np.isfinite(quantizer.lookup(codes)))
    assert np.all(np.isnan(quantized)) or not np.isnan(value)
    if kind is ResidualVQ:
        return  # has too many codes for an index
    assert quantizer.num_codes == SIZE
    np.testing.assert_array_equal(quantizer.codes_to_indices(codes), codes)
    np.testing.assert_array_equal(quantizer.unflatten_codes(codes), codes)


def test_a_large_codebooks_indices_round_trip_exhaustively():
    quantizer = ResidualVQ(2, depth=4, codebook_size=16, rngs=nnx.Rngs(0))
    indices = np.arange(16**4, dtype=np.int32)
    codes = quantizer.unflatten_codes(indices)
    np.testing.assert_array_equal(codes, np.stack(np.unravel_index(indices, (16,) * 4, "F"), -1))
    np.testing.assert_array_equal(quantizer.codes_to_indices(codes), indices)
