"""Packed images, the form for TPUs, against plain ones: layer by layer, and whole runs."""

import functools

import jax
import numpy as np
import pytest

from llvq import evaluate, train
from llvq.codec import passes
from llvq.data import ArrayDataset
from llvq.models import packing as packings
from tests import tiny
from tests.convolutions import CASES, assert_close
from tests.runs import create_model


@pytest.mark.parametrize(
    ("platform", "latent_shape", "features", "packing"),
    [
        ("tpu", (256, 256), 32, 2),  # FFHQ-1024
        ("tpu", (74, 74), 64, None),  # CelebA
        ("tpu", (14, 14), 64, None),  # FashionMNIST
        ("tpu", (7, 14), 32, 1),
        ("tpu", (12, 20), 16, 4),
        ("tpu", (12, 20), 3, 4),
        ("tpu", (8, 8), 63, 2),
        ("gpu", (256, 256), 32, None),
        ("cpu", (256, 256), 32, None),
    ],
)
def test_packed_are_as_many_pixels_as_fill_the_lanes(platform, latent_shape, features, packing):
    assert packings.choose(platform, latent_shape, features) == packing


def test_packing_goes_block_by_block():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    packed = packings.pack(images, 2)
    for row, column in np.ndindex(2, 3):
        block = images[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(packed[:, row, column], block.reshape(2, 12))
    np.testing.assert_array_equal(packings.unpack(packed, 2), images)


@pytest.mark.parametrize("packing", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_layers_equal_the_plain_ones(case, packing):
    ours, plain, size = CASES[case]
    before, after = {"4x4, stride 2": (2, 1), "4x4, stride 2, transposed": (1, 2)}.get(case, (1, 1))
    rng = np.random.default_rng(packing)
    shape = 2, 3 * before * packing, 2 * before * packing, 5
    with jax.enable_x64(True):
        x, kernel = rng.standard_normal(shape), rng.standard_normal((size, size, 5, 4))
        expected, pull_back = jax.vjp(plain, x, kernel)
        gradient = rng.standard_normal(expected.shape)

        @jax.jit
        def run(x, kernel, gradient):
            def packed(x, kernel):
                y = ours(packings.pack(x, before * packing), kernel, packing=packing)
                return packings.unpack(y, after * packing)

            y, pull_back = jax.vjp(packed, x, kernel)
            return y, *pull_back(gradient)

        assert_close(run, (x, kernel, gradient), (expected, *pull_back(gradient)))


def run(workdir, quantizer, batch_size):
    """Final state and evaluation of a short run on images of 16×16, in float64."""
    images = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 1), np.uint8)
    data = ArrayDataset(train=images[:16], validation=images[16:24], test=images[24:])
    fields = {"model.image_shape": (16, 16, 1), "batch_size": batch_size, "num_train_steps": 4}
    config = tiny.config(quantizer, compute_dtype="float64", **fields)
    with jax.enable_x64(True):
        state = train.train_and_evaluate(config, workdir, data)
        return state, evaluate.evaluate(workdir, data)


def test_codes_and_images_of_a_packed_model_have_their_plain_shapes():
    model = create_model(tiny.config("dense_lattice", **{"model.image_shape": (16, 16, 1)}))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    encode = jax.jit(lambda x: model.encode(x))
    expected, plain = np.asarray(encode(images)), np.asarray(model.reconstruct(images))
    model.set_attributes(packing=2)
    found = np.asarray(jax.jit(lambda x: model.encode(x))(images))
    # The same sums in another order: a code at a wall may fall to the other side.
    assert found.shape == expected.shape
    assert np.mean(found != expected) < 0.01
    np.testing.assert_allclose(model.reconstruct(images), plain, atol=1e-4)
    np.testing.assert_allclose(model.decode(expected), plain, atol=1e-4)
    assert model.pair(images).codes.shape == (3, 4, 4, 4, 8)


# On eight devices a batch of 8 is an image each; of 2 four of them share one.
@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "batch_size"), [("vq_ema", 2), ("dense_lattice", 8)])
def test_a_run_is_the_same(quantizer, batch_size, tmp_path, monkeypatch):
    plain_state, plain_results = run(tmp_path / "plain", quantizer, batch_size)
    calls = []

    def choose(platform, latent_shape, features):
        calls.append((platform, latent_shape, features))
        return 2

    monkeypatch.setattr(packings, "choose", choose)
    # What the codec has compiled before is not packed.
    monkeypatch.setattr(passes, "_steps", functools.cache(passes._steps.__wrapped__))
    state, results = run(tmp_path / "packed", quantizer, batch_size)
    # Training and evaluation share out an image where they must; the codec takes whole ones.
    assert set(calls) == {("cpu", (8 * batch_size // 8, 8), 8), ("cpu", (8, 8), 8)}
    for path, expected in jax.tree.leaves_with_path(plain_state):
        found = dict(jax.tree.leaves_with_path(state))[path]
        # The same sums in another order, in float64, over four steps.
        error = np.linalg.norm(np.asarray(found) - expected)
        assert error <= 1e-9 * np.linalg.norm(expected), path
    assert results.keys() == plain_results.keys()
    for name, expected in plain_results.items():
        found = results[name]
        assert found == (
            pytest.approx(expected, rel=1e-9) if isinstance(found, float) else expected
        )
