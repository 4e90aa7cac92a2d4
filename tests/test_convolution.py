"""The convolutions of each backend against XLA's plain ones, forward and backward.

The plain ones are themselves compared with PyTorch's layers in test_model.py.
"""

import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from llvq.models import convolution
from llvq.runtime import sharding
from tests.convolutions import CASES, assert_close

_TRANSPOSED = "4x4, stride 2, transposed"
_FORMS = {
    **CASES,
    "transposed, not on a CPU": (convolution._conv_transpose, *CASES[_TRANSPOSED][1:]),
}


@pytest.mark.parametrize(
    ("channels", "batch"), [((1, 5), 16), ((5, 1), 3), ((3, 40), 4), ((40, 3), 2), ((40, 40), 1)]
)
@pytest.mark.parametrize("case", _FORMS)
def test_equals_the_plain_convolution(case, channels, batch):
    ours, plain, size = _FORMS[case]
    rng = np.random.default_rng(hash((size, channels)) % 2**32)
    height, width = 2 * rng.integers(1, 7, 2)
    with jax.enable_x64(True):
        x = rng.standard_normal((batch, height, width, channels[0]))
        kernel = rng.standard_normal((size, size, *channels))
        expected, pull_back = jax.vjp(plain, x, kernel)
        gradient = rng.standard_normal(expected.shape)

        @jax.jit
        def run(x, kernel, gradient):
            y, pull_back = jax.vjp(ours, x, kernel)
            return y, *pull_back(gradient)

        assert_close(run, (x, kernel, gradient), (expected, *pull_back(gradient)))


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", CASES)
def test_accelerators_get_the_plain_convolutions(case):
    """The program for a GPU has one convolution, and rearranges neither images nor kernels."""
    ours, _, size = CASES[case]
    x, kernel = np.ones((2, 8, 8, 3), np.float32), np.ones((size, size, 3, 5), np.float32)
    text = lowered(ours, "cuda", x, kernel)
    assert text.count("stablehlo.convolution") == 1
    channels = "5x3" if case == _TRANSPOSED else "3x5"  # it is the transpose of one from 5 to 3
    assert f"tensor<{size}x{size}x{channels}xf32>) -> tensor<2x" in text
    both = lowered(lambda *inputs: jax.vjp(ours, *inputs)[1](ours(*inputs)), "cuda", x, kernel)
    for rearranging in ("stablehlo.reshape", "stablehlo.dot_general", "stablehlo.pad"):
        assert rearranging not in text + both
    on_cpu = lowered(ours, "cpu", x, kernel)
    is_plain = "stablehlo.convolution" in on_cpu and "stablehlo.reshape" not in on_cpu
    assert is_plain == (case == "3x3")


@pytest.mark.parametrize("case", CASES)
def test_cudnn_has_kernels_for_all_gradients(case):
    """It has none for a dilated image convolved with another image."""
    ours, _, size = CASES[case]
    x, kernel = np.ones((2, 8, 8, 3), np.float32), np.ones((size, size, 3, 5), np.float32)
    text = lowered(lambda *inputs: jax.vjp(ours, *inputs)[1](ours(*inputs)), "cuda", x, kernel)
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    assert len(convolutions) == 3
    for found in convolutions:
        if "lhs_dilate = [2, 2]" in found:
            assert f", tensor<{size}x{size}x" in found


def test_in_bfloat16_pixels_are_summed_in_float32():
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(size=(2, 64, 14, 14, 8)).astype(jnp.bfloat16)
    kernel = jnp.zeros((1, 1, 8, 8), jnp.bfloat16)
    pull_back = jax.vjp(functools.partial(convolution.conv, strides=1), x, kernel)[1]
    _, found = pull_back(jnp.asarray(gradient))
    assert found.dtype == jnp.bfloat16
    expected = np.einsum("bhwi,bhwo->io", *np.asarray((x, gradient), np.float64))
    # Rounded once, at the end: by 2 ** -9 at most. With rows rounded it is twice as much.
    assert np.linalg.norm(found[0, 0] - expected) < 2**-9 * np.linalg.norm(expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for a CPU")
def test_steps_on_a_cpu_leave_convolutions_to_eigen():
    """By default XLA makes fusions for YNNPACK of them, with far slower gradients of kernels."""
    options = sharding.compiler_options(sharding.make_mesh())
    run = jax.jit(functools.partial(convolution.conv, strides=1), compiler_options=options)
    shapes = (8, 74, 74, 64), (3, 3, 64, 64)  # CelebA's; small ones it leaves alone
    x, kernel = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    text = run.lower(x, kernel).compile().as_text()
    assert " convolution(" in text
    assert "fusion(" not in text


@pytest.mark.parametrize("case", CASES)
def test_no_images_are_no_error(case):
    ours, plain, size = CASES[case]
    x, kernel = np.zeros((0, 4, 4, 3), np.float32), np.ones((size, size, 3, 5), np.float32)
    y, pull_back = jax.vjp(ours, x, kernel)
    assert y.shape == plain(x, kernel).shape
    x_gradient, kernel_gradient = pull_back(y)
    assert x_gradient.shape == x.shape
    assert not kernel_gradient.any()
