"""SSIM against dm-pix and NumPy; PSNR against TensorFlow and its closed form."""

import dm_pix
import jax
import numpy as np
import pytest
from flax import nnx

from llvq import SparseLattice
from llvq.evaluation import metrics
from llvq.models import Pair
from tests import tiny


def image_pairs(shape):
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(5, *shape)).astype(np.float32)
    noise = rng.normal(size=a.shape) * np.array([0, 0.01, 0.1, 0.3, 1.0])[:, None, None, None]
    return a, np.clip(a + noise, 0, 1).astype(np.float32)


def float64_ssim(a, b):
    """Wang et al. 2004, window by window."""
    weights = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weights = np.outer(weights, weights) / np.sum(weights) ** 2

    def mean(values):
        windows = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(1, 2))
        return np.einsum("...xy,xy", windows, weights)

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b, c1, c2 = mean(a), mean(b), 0.01**2, 0.03**2
    covariance = mean(a * b) - mean_a * mean_b
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return np.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


# Less than a tile of columns, one, several; and channels so many that a tile must be larger.
@pytest.mark.parametrize(
    "shape", [(11, 11, 3), (28, 28, 1), (20, 128, 1), (130, 90, 3), (12, 40, 8)]
)
def test_ssim(shape):
    a, b = image_pairs(shape)
    found = jax.jit(metrics.ssim)(a, b)
    np.testing.assert_allclose(found, float64_ssim(a, b), atol=2e-6)
    np.testing.assert_allclose(found, jax.vmap(dm_pix.ssim)(a, b), atol=1e-5)
    # Where nothing but rounding distinguishes a variance from 0.
    flat = np.full_like(a, 0.7)
    noisy = (flat + 0.001 * a).astype(np.float32)
    np.testing.assert_allclose(metrics.ssim(flat, noisy), float64_ssim(flat, noisy), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_against_tensorflow(channels):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is the oracle")
    a, b = image_pairs((28, 28, channels))
    psnr, expected = jax.jit(metrics.psnr)(a, b), tf.image.psnr(a, b, 1.0)
    np.testing.assert_allclose(psnr[1:], expected[1:], rtol=1e-5)  # the first pair is equal
    mean_squares = np.mean((a[1:].astype(np.float64) - b[1:]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(a, b)[1:], -10 * np.log10(mean_squares), rtol=1e-5)


def test_an_exact_reconstruction_counts_as_100_db():
    images = np.zeros((2, 12, 12, 1), np.float32)
    np.testing.assert_allclose(metrics.psnr(images, images), [100, 100], rtol=1e-6)


def tiny_model():
    return tiny.paper_model(
        SparseLattice(8, rngs=nnx.Rngs(0)), hidden_dims=(8,), value_range=(-0.5, 0.5)
    )


def test_value_ranges_are_mapped_and_clipped():
    model = tiny_model()
    images = np.array([-0.7, -0.5, 0.0, 0.5, 0.9], np.float32).reshape(1, 1, 5, 1)
    np.testing.assert_allclose(np.ravel(model.to_unit(images)), [0, 0, 0.5, 1, 1])


def test_sums_and_means_leave_out_what_the_mask_does():
    rng = np.random.default_rng(0)
    images, outputs = rng.uniform(-0.5, 0.7, size=(2, 3, 16, 16, 1)).astype(np.float32)
    pair = Pair(images, images, outputs, np.zeros((3, 8, 8)), 0.0, {}, tiny_model())
    sums = metrics.sums(pair, np.array([True, False, True]))
    figures = metrics.finish({**jax.device_get(sums), "quantizer_loss": 3.0}, 2)
    images, outputs = images.astype(np.float64)[[0, 2]], outputs.astype(np.float64)[[0, 2]]
    assert figures["mse"] == pytest.approx(np.mean((images - outputs) ** 2), rel=1e-6)
    unit, clipped = images + 0.5, np.clip(outputs + 0.5, 0, 1)
    psnrs = -10 * np.log10(np.mean((unit - clipped) ** 2, axis=(1, 2, 3)))
    assert figures["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-6)
    assert figures["quantizer_loss"] == 1.5
    assert figures.keys() == {"quantizer_loss", *metrics.METRICS}
