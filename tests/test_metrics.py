"""PSNR and SSIM against TensorFlow's, and the closed form of PSNR."""

import jax
import numpy as np
import pytest

from llvq.evaluation import metrics

tf = pytest.importorskip("tensorflow", reason="TensorFlow is the oracle")


def image_pairs(channels):
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(5, 28, 28, channels)).astype(np.float32)
    noise = rng.normal(size=a.shape) * np.array([0, 0.01, 0.1, 0.3, 1.0])[:, None, None, None]
    return a, np.clip(a + noise, 0, 1).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_against_tensorflow(channels):
    a, b = image_pairs(channels)
    np.testing.assert_allclose(jax.jit(metrics.ssim)(a, b), tf.image.ssim(a, b, 1.0), atol=1e-5)
    np.testing.assert_allclose(jax.jit(metrics.psnr)(a, b), tf.image.psnr(a, b, 1.0), rtol=1e-5)
    mean_squares = np.mean((a[1:].astype(np.float64) - b[1:]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(a, b)[1:], -10 * np.log10(mean_squares), rtol=1e-5)


def test_value_ranges_are_mapped_and_clipped():
    images = np.array([-0.7, -0.5, 0.0, 0.5, 0.9], np.float32).reshape(1, 1, 5, 1)
    mapped = metrics.to_unit_range(images, (-0.5, 0.5))
    np.testing.assert_allclose(np.ravel(mapped), [0, 0, 0.5, 1, 1])
