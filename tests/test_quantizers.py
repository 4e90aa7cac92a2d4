"""The quantizers against NumPy in float64.

Inputs are float32 and results agree to float32's rounding over the sums involved: 1e-5 of a
tensor's norm. Codes are compared exactly, away from ties by construction of the inputs.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import VQ, VQEMA, DenseLattice, SparseLattice, config, fields, quantizers
from llvq.errors import UserError
from llvq.models import factory
from llvq.quantizers import codebook_search, registry
from llvq.quantizers.lattice import LARGEST_CODE, SMALLEST_BASIS, sparse_basis_bound
from tests import tiny
from tests.tiny import NAMES

DIM = 8
BETA = 0.25


def assert_close(actual, desired):
    error = np.linalg.norm(np.asarray(actual, np.float64) - desired) / np.linalg.norm(desired)
    assert error < 1e-5


def make_latents(shape=(4, 3, 5, DIM), scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def make(name, **options):
    options = tiny.OPTIONS.get(name, {}) | options
    return quantizers.create(name, tiny.latent_dim(name), rngs=nnx.Rngs(1), **options)


def nearest_in_float64(latents, codebook):
    distances = ((latents[..., None, :].astype(np.float64) - codebook) ** 2).sum(-1)
    two_smallest = np.sort(distances, axis=-1)[..., :2]
    assert np.all(np.diff(two_smallest) > 1e-4), "inputs too near a tie to test with"
    return distances.argmin(-1)


def grads_of(quantizer, latents, weights):
    """Gradients of Σ weights·quantized + quantizer loss: by parameters and by latents."""

    def loss_fn(quantizer, latents):
        quantized, _, loss, _ = quantizer(latents)
        return jnp.sum(weights * quantized) + loss

    return nnx.jit(nnx.grad(loss_fn, argnums=(0, 1)))(quantizer, latents)


@pytest.fixture(params=[1024, 6])
def _blocks(request, monkeypatch):
    """The codebook searched whole, and in three blocks, the last not full."""
    monkeypatch.setattr(codebook_search, "_BLOCK_SIZE", request.param)


@pytest.fixture
def spread_codebook():
    """16 vectors far apart, so that no latent near one of them is near a tie."""
    return 3.0 * np.random.default_rng(5).normal(size=(16, DIM)).astype(np.float32)


def latents_near(codebook, seed=0):
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(codebook), (4, 3, 5))
    return (codebook[chosen] + rng.normal(0, 0.3, (4, 3, 5, DIM))).astype(np.float32)


@pytest.mark.usefixtures("_blocks")
class TestVQ:
    def test_against_numpy(self, spread_codebook):
        quantizer = make("vq", codebook_size=16)
        quantizer.codebook[...] = jnp.asarray(spread_codebook)
        latents = latents_near(spread_codebook)
        codes = nearest_in_float64(latents, spread_codebook)
        distance = np.mean((spread_codebook[codes] - latents.astype(np.float64)) ** 2)

        quantized, actual_codes, loss, metrics = quantizer(latents)
        np.testing.assert_array_equal(actual_codes, codes)
        np.testing.assert_array_equal(quantized, spread_codebook[codes])
        assert_close(metrics["codebook_loss"], distance)
        assert_close(metrics["commitment_loss"], distance)
        assert_close(loss, (1 + BETA) * distance)
        np.testing.assert_array_equal(quantizer.lookup(actual_codes), quantized)

    def test_float64(self, spread_codebook):
        with jax.enable_x64(True):
            quantizer = make("vq", codebook_size=16, param_dtype=np.float64)
            quantizer.codebook[...] = jnp.asarray(spread_codebook, np.float64)
            latents = latents_near(spread_codebook).astype(np.float64)
            _, codes, *_ = quantizer(latents)
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, nearest_in_float64(latents, spread_codebook))

    def test_gradients(self, spread_codebook):
        quantizer = make("vq", codebook_size=16)
        quantizer.codebook[...] = jnp.asarray(spread_codebook)
        latents = latents_near(spread_codebook)
        weights = make_latents(seed=7)
        codes = nearest_in_float64(latents, spread_codebook)
        difference = spread_codebook[codes] - latents.astype(np.float64)

        by_parameters, by_latents = grads_of(quantizer, latents, weights)
        desired = np.zeros_like(spread_codebook, np.float64)
        np.add.at(desired, codes, 2 * difference / latents.size)
        assert_close(by_parameters["codebook"][...], desired)
        assert_close(by_latents, weights - BETA * 2 * difference / latents.size)

    def test_lowest_index_wins_a_tie(self):
        quantizer = make("vq", codebook_size=16)
        quantizer.codebook[...] = jnp.ones((16, DIM)).at[jnp.array([1, 4, 9])].set(0.0)
        _, codes, *_ = quantizer(np.full((1, DIM), 0.1, np.float32))
        assert codes == 1

    def test_starts_uniform_within_one_over_codebook_size(self):
        codebook = np.asarray(VQ(64, rngs=nnx.Rngs(0)).codebook[...])
        assert codebook.shape == (512, 64)
        assert 0.999 / 512 < np.abs(codebook).max() <= 1 / 512
        assert abs(codebook.std() * 512 - 1 / np.sqrt(3)) < 0.01


@pytest.mark.usefixtures("_blocks")
class TestVQEMA:
    def test_three_training_steps_against_numpy(self, spread_codebook):
        quantizer = make("vq_ema", codebook_size=16)
        quantizer.codebook[...] = jnp.asarray(spread_codebook)
        codebook = spread_codebook.astype(np.float64)
        ema_sum = np.asarray(quantizer.ema_sum[...], np.float64)
        cluster_size = np.zeros(16)
        for step in range(3):
            latents = latents_near(codebook, seed=step)
            codes = nearest_in_float64(latents, codebook)
            quantized, actual_codes, loss, _ = quantizer(latents, train=True)
            # The result is of the codebook from before the update.
            np.testing.assert_array_equal(actual_codes, codes)
            assert_close(quantized, codebook[codes])
            distance = np.mean((codebook[codes] - latents) ** 2)
            assert_close(loss, BETA * distance)

            one_hot = np.eye(16)[codes.reshape(-1)]
            cluster_size = 0.99 * cluster_size + 0.01 * one_hot.sum(0)
            n = cluster_size.sum()
            cluster_size = (cluster_size + 1e-5) / (n + 16 * 1e-5) * n
            ema_sum = 0.99 * ema_sum + 0.01 * one_hot.T @ latents.reshape(-1, DIM)
            codebook = ema_sum / cluster_size[:, None]
            assert_close(quantizer.cluster_size[...], cluster_size)
            assert_close(quantizer.ema_sum[...], ema_sum)
            assert_close(quantizer.codebook[...], codebook)
            # Clusters that nothing fell into are blown up; carry on from an even codebook.
            codebook = spread_codebook.astype(np.float64)
            quantizer.codebook[...] = jnp.asarray(spread_codebook)

    def test_evaluation_changes_nothing(self, spread_codebook):
        quantizer = make("vq_ema", codebook_size=16)
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(quantizer)))
        quantizer(make_latents())
        after = nnx.to_pure_dict(nnx.state(quantizer))
        jax.tree.map(np.testing.assert_array_equal, before, after)

    def test_has_no_trained_parameters_and_starts_normal(self):
        quantizer = VQEMA(64, rngs=nnx.Rngs(0))
        assert not jax.tree.leaves(nnx.state(quantizer, nnx.Param))
        codebook, ema_sum = np.asarray(quantizer.codebook[...]), np.asarray(quantizer.ema_sum[...])
        for array in (codebook, ema_sum):
            assert abs(array.mean()) < 0.02
            assert abs(array.std() - 1) < 0.02
        assert abs(np.corrcoef(codebook.ravel(), ema_sum.ravel())[0, 1]) < 0.02
        assert not np.any(np.asarray(quantizer.cluster_size[...]))

    def test_gradient_reaches_latents_only(self, spread_codebook):
        quantizer = make("vq_ema", codebook_size=16)
        quantizer.codebook[...] = jnp.asarray(spread_codebook)
        latents, weights = latents_near(spread_codebook), make_latents(seed=7)
        codes = nearest_in_float64(latents, spread_codebook)
        _, by_latents = grads_of(quantizer, latents, weights)
        difference = spread_codebook[codes] - latents.astype(np.float64)
        assert_close(by_latents, weights - BETA * 2 * difference / latents.size)


@pytest.mark.parametrize("name", ["vq", "vq_ema"])
def test_a_large_codebook_takes_no_matrix_of_all_pairs(name):
    num_vectors, codebook_size = 4096, 65536
    graphdef, state = nnx.split(make(name, codebook_size=codebook_size))
    state = nnx.to_pure_dict(state)

    def loss(state, latents):
        quantizer = nnx.merge(graphdef, state)
        output = quantizer(latents, train=True)
        return jnp.sum(output.quantized) + output.loss, nnx.state(quantizer)

    latents = jax.ShapeDtypeStruct((num_vectors, DIM), jnp.float32)
    step = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    memory = step.lower(state, latents).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_vectors * codebook_size * 4 / 10


class TestLattice:
    @pytest.mark.parametrize(("name", "gamma"), [("sparse_lattice", 1.0), ("dense_lattice", -1.0)])
    def test_against_numpy(self, name, gamma):
        quantizer = make(name)
        basis = np.array([0.5, -0.25, 3.0, 1e-3, -2.0, 0.1, -1e-2, 7.0], np.float32)
        quantizer.basis[...] = jnp.asarray(basis)
        rng = np.random.default_rng(0)
        desired_codes = rng.integers(-50, 50, (4, 3, 5, DIM))
        offsets = rng.uniform(-0.4, 0.4, desired_codes.shape)  # clear of the ties at ±0.5
        latents = ((desired_codes + offsets) * basis.astype(np.float64)).astype(np.float32)
        difference = desired_codes * basis.astype(np.float64) - latents
        distance = np.mean(difference**2)
        weights = make_latents(seed=7)

        quantized, codes, loss, metrics = quantizer(latents)
        assert codes.dtype == jnp.int32
        np.testing.assert_array_equal(codes, desired_codes)
        np.testing.assert_array_equal(quantized, basis * desired_codes.astype(np.float32))
        assert_close(metrics["codebook_loss"], distance)
        assert_close(metrics["basis_l1"], np.abs(basis.astype(np.float64)).sum())
        assert_close(loss, (1 + BETA) * distance - gamma * np.abs(basis).sum())
        np.testing.assert_array_equal(quantizer.lookup(codes), quantized)

        by_parameters, by_latents = grads_of(quantizer, latents, 0.0 * weights)
        axes = (0, 1, 2)
        assert_close(
            by_parameters["basis"][...],
            (2 * difference * desired_codes).sum(axes) / latents.size - gamma * np.sign(basis),
        )
        assert_close(by_latents, -BETA * 2 * difference / latents.size)

    def test_straight_through_to_the_encoder(self):
        latents, weights = make_latents(), make_latents(seed=7)
        quantizer = make("sparse_lattice", commitment_cost=0.0)
        _, by_latents = grads_of(quantizer, latents, weights)
        np.testing.assert_array_equal(by_latents, weights)

    def test_ties_go_to_even(self):
        quantizer = make("sparse_lattice")
        quantizer.basis[...] = jnp.ones(DIM)
        _, codes, *_ = quantizer(
            np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 0.0]], np.float32)
        )
        np.testing.assert_array_equal(codes, [[0, 2, 2, 0, -2, -2, 4, 0]])

    def test_the_reciprocal_is_taken_first(self):
        """Where z/b and z·(1/b) round to different integers, it is the second that counts."""
        rng = np.random.default_rng(0)
        basis = rng.uniform(1e-6, 1e-5, 10**6).astype(np.float32)
        latents = rng.normal(size=10**6).astype(np.float32)
        product = np.rint(latents * (np.float32(1) / basis))
        differs = np.flatnonzero(product != np.rint(latents / basis))[:DIM]
        assert len(differs) == DIM
        quantizer = make("dense_lattice")
        quantizer.basis[...] = jnp.asarray(basis[differs])
        codes = jax.jit(lambda z: quantizer(z)[1])(latents[differs][None])
        np.testing.assert_array_equal(codes[0], product[differs])

    @pytest.mark.parametrize("name", ["sparse_lattice", "dense_lattice"])
    def test_basis_at_zero_stays_finite_and_moves_on(self, name):
        quantizer = make(name)
        tiny = [0.0, -0.0, 1e-12, -1e-12, 2e-38, -2e-38, 9.9e-8, -9.9e-8]
        quantizer.basis[...] = jnp.asarray(tiny, jnp.float32)
        latents = make_latents()
        quantized, _, loss, metrics = quantizer(latents)
        floor = np.float32(SMALLEST_BASIS)
        np.testing.assert_array_equal(
            quantizer.effective_basis(), floor * np.array([1, 1, 1, -1, 1, -1, 1, -1])
        )
        # ±1e-7 is still a lattice: nothing is further from it than half a step, but for float32.
        assert np.abs(np.asarray(quantized) - latents).max() < 1e-6
        by_parameters, by_latents = grads_of(quantizer, latents, latents)
        for value in (loss, *metrics.values(), by_latents, by_parameters["basis"][...]):
            assert np.all(np.isfinite(value))
        # The size term alone moves an entry this small, away from zero or towards and across it.
        sign = np.array([1, 1, 1, -1, 1, -1, 1, -1])
        np.testing.assert_allclose(by_parameters["basis"][...], -quantizer.gamma * sign)

    def test_training_crosses_zero_and_stays_finite(self):
        quantizer = make("dense_lattice")
        quantizer.basis[...] = jnp.asarray([3e-3, -3e-3, 1e-3, 5e-3, -1e-3, 2e-3, -2e-3, 4e-3])
        signs_seen = [np.sign(quantizer.basis[...])]
        for step in range(20):
            by_parameters, by_latents = grads_of(quantizer, make_latents(seed=step), 0.0)
            assert np.all(np.isfinite(by_latents))
            quantizer.basis[...] -= 1e-3 * by_parameters["basis"][...]
            assert np.all(np.isfinite(quantizer.basis[...]))
            signs_seen.append(np.sign(quantizer.basis[...]))
        assert np.all(np.ptp(signs_seen, axis=0) == 2), "every entry should have changed sign"

    def test_codes_saturate(self):
        quantizer = make("dense_lattice")
        quantizer.basis[...] = jnp.full(DIM, SMALLEST_BASIS)
        _, codes, *_ = quantizer(np.array([[1e3, -1e3, np.inf, -np.inf, 1e30, -1e30, 0, 1]], "f"))
        top = LARGEST_CODE
        np.testing.assert_array_equal(codes[0, :7], [top, -top, top, -top, top, -top, 0])
        assert codes[0, 7] == np.rint(np.float32(1) * (np.float32(1) / np.float32(1e-7)))

    def test_starting_bases(self):
        assert sparse_basis_bound(512, 64) == pytest.approx(9.77, abs=0.01)
        for cls, bound in ((SparseLattice, 9.77), (DenseLattice, 1.0)):
            bases = [cls(64, rngs=nnx.Rngs(seed)).basis[...] for seed in range(20)]
            largest = np.abs(bases).max()
            assert 0.99 * bound < largest < 1.001 * bound
            assert abs(np.mean(bases)) < 0.1 * bound

    def test_lookup_is_float32_whatever_the_latents_are(self):
        quantizer = make("dense_lattice")
        quantized, codes, *_ = quantizer(make_latents().astype(jnp.bfloat16))
        assert quantized.dtype == jnp.bfloat16
        looked_up = quantizer.lookup(codes)
        assert looked_up.dtype == jnp.float32
        np.testing.assert_array_equal(looked_up.astype(jnp.bfloat16), quantized)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_masked_images_do_not_count(self, name):
        shape = 4, 3, 5, tiny.latent_dim(name)
        latents, junk = make_latents(shape), make_latents(shape, seed=9, scale=5.0)
        mask = np.array([True, True, True, True, False, False, False, False])
        plain, masked = make(name), make(name)
        key = jax.random.key(0)
        train = nnx.jit(lambda quantizer, *given: quantizer(given[0], train=True, **given[1]))
        output = train(plain, latents, {"key": key})
        others = train(masked, np.concatenate([latents, junk]), {"mask": mask, "key": key})
        np.testing.assert_array_equal(others.codes[:4], output.codes)
        ours, theirs = ({"loss": x.loss, **x.metrics} for x in (others, output))
        assert ours.keys() == theirs.keys()
        largest = float(max(map(abs, theirs.values())))  # some losses are differences of others
        for part, value in theirs.items():
            assert float(ours[part]) == pytest.approx(float(value), abs=1e-6 * largest)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            nnx.to_pure_dict(nnx.state(plain)),
            nnx.to_pure_dict(nnx.state(masked)),
        )

    def test_wrong_latent_dim_is_refused(self, name):
        latent_dim = tiny.latent_dim(name)
        with pytest.raises(ValueError, match=f"latent_dim={latent_dim}"):
            make(name)(make_latents((2, 3, 3, latent_dim + 1)))

    def test_any_number_of_axes(self, name):
        latents = make_latents((6, tiny.latent_dim(name)))
        quantizer = make(name)
        call = jax.jit(lambda latents: quantizer(latents))
        flat, flat_codes, *_ = call(latents)
        np.testing.assert_array_equal(jax.jit(quantizer.lookup)(flat_codes), flat)
        deep, deep_codes, *_ = call(latents.reshape(3, 1, 2, -1))
        np.testing.assert_array_equal(flat.reshape(deep.shape), deep)
        np.testing.assert_array_equal(flat_codes.reshape(deep_codes.shape), deep_codes)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_starts_the_same_whatever_the_quantizer(name):
    """Also the same as with a quantizer that draws nothing."""

    def kernels(quantizer):
        values = tiny.config(quantizer, **{"model.latent_dim": tiny.latent_dim(name)})
        model = factory.create_model(config.parse(values).architecture, seed=7)
        return nnx.to_pure_dict(nnx.state((model.encoder, model.decoder)))

    jax.tree.map(np.testing.assert_array_equal, kernels(name), kernels("diagonal_lattice"))


@pytest.mark.parametrize("name", NAMES)
def test_every_named_value_of_an_option_makes_a_quantizer(name):
    constructor = quantizers.QUANTIZERS[name].constructor
    for option, (default, range_) in fields.options(constructor.__init__).items():
        values = getattr(range_, "values", (default,))
        assert default in values
        for value in values:
            quantizers.create(name, 0, rngs=nnx.Rngs(0), **{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_registered_recipes_have_options_and_fields_that_exist(name):
    entry = quantizers.QUANTIZERS[name]
    registry.complete(name, entry.standard)
    made = config.make_config(name, "paper", image_shape=(12, 12, 1), **entry.paper)
    assert all(getattr(made, field) == value for field, value in entry.paper.items())


def types_of_variables(name, **options):
    flat = nnx.to_flat_state(nnx.state(make(name, **options)))
    return {type(variable) for _, variable in flat}


def test_variables_have_types_of_their_own():
    learned = {"restart_threshold": 0.1, "initialization": "batch"}
    assert types_of_variables("vq", **learned) == {nnx.Param, quantizers.Statistic}
    assert types_of_variables("vq_ema", **learned) == {quantizers.Statistic}
    assert types_of_variables("simvq") == {nnx.Param, quantizers.Frozen}
    assert types_of_variables("e8_lattice") == {nnx.Param}


def test_missing_options_have_their_defaults():
    options = registry.complete("vq", {"codebook_size": 8})
    assert options == {**registry.complete("vq", {}), "codebook_size": 8}
    assert options["commitment_cost"] == 0.25


def test_the_loss_warms_up_where_a_quantizer_has_the_option():
    assert registry.loss_warmup(registry.complete("e8_lattice", {"warmup": 0.3})) == 0.3
    assert registry.loss_warmup(registry.complete("vq", {})) == 0


def test_unknown_name():
    with pytest.raises(UserError, match=r"'xvq'.*vq, vq_ema, sparse_lattice, dense_lattice"):
        quantizers.create("xvq", 8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "latent_dim", "options", "words"),
    [
        ("learned_lattice", 8, {"block_size": 0}, "quantizer.block_size"),
        ("multirate_lattice", 8, {"lattice": "x"}, "quantizer.lattice"),
        ("lfq", 0, {"codebook_size": 0}, "quantizer.codebook_size"),
        ("fsq", 0, {"levels": 5}, "quantizer.levels"),
        ("vq", -3, {}, "model.latent_dim"),
        (
            "vq",
            8,
            {"codebooksize": 8},
            r"codebooksize is not an option of vq \(did you mean codebook_",
        ),
        (
            "vq_ema",
            8,
            {"ema_decay": 0.9},
            r"\(did you mean decay\?\): vq_ema takes codebook_size, ",
        ),
        (
            "vq",
            8,
            {"xyz": 8},
            r"config\.quantizer\.xyz is not an option of vq: vq takes code",
        ),
    ],
)
def test_impossible_options_are_named(name, latent_dim, options, words):
    with pytest.raises(UserError, match=words):
        quantizers.create(name, latent_dim, rngs=nnx.Rngs(0), **options)


def test_options_may_be_numpys_numbers():
    quantizer = quantizers.VQ(
        8, codebook_size=np.int64(16), commitment_cost=np.float32(0.5), rngs=nnx.Rngs(0)
    )
    assert quantizer.codebook[...].shape == (16, 8)
    assert config.make_dict("vq", quantizer={"codebook_size": np.int64(16)}) == (
        config.make_dict("vq", quantizer={"codebook_size": 16})
    )
