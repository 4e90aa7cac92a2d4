"""Every layer of the network in the forms of llvq and of XLA, and how close they must be."""

import functools

import numpy as np
from jax import lax

from llvq.models import convolution

_plain = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))

# (ours, XLA's, kernel size): every layer of the network.
CASES = {
    "3x3": (
        functools.partial(convolution.conv, strides=1),
        lambda x, k: _plain(x, k, (1, 1), ((1, 1), (1, 1))),
        3,
    ),
    "1x1": (
        functools.partial(convolution.conv, strides=1),
        lambda x, k: _plain(x, k, (1, 1), "VALID"),
        1,
    ),
    "4x4, stride 2": (
        functools.partial(convolution.conv, strides=2),
        lambda x, k: _plain(x, k, (2, 2), ((1, 1), (1, 1))),
        4,
    ),
    "4x4, stride 2, transposed": (
        convolution.conv_transpose,
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
        4,
    ),
}


def assert_close(function, arguments, expected):
    """In float64 to 1e-12, in float32 to 1e-5."""
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        results = function(*(a.astype(dtype) for a in arguments))
        for result, wanted in zip(results, expected, strict=True):
            assert result.dtype == dtype
            # Sums of many products of either sign: rounding goes with the tensor's norm.
            error = np.linalg.norm(result - wanted)
            assert error <= tolerance * np.linalg.norm(wanted)
