"""Convolutions for a CPU, where XLA's own are slow, above all in the gradients of their kernels.

Convolutions of 1 × 1 are products of matrices. Those of stride 2, and transposed ones, become dense
ones of stride 1 by space-to-depth and depth-to-space.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from llvq.models.packing import DIMENSION_NUMBERS, depth_to_space, space_to_depth

_Images = Float[Array, "batch height width channels"]
_Kernel = Float[Array, "kernel_height kernel_width in out"]


def conv_strided(x: _Images, kernel: _Kernel, strides: int) -> _Images:
    """A convolution of stride `strides`; see `convolution.conv`."""
    size, _, features_in, features_out = kernel.shape
    blocks = size // strides
    taps = kernel.reshape(blocks, strides, blocks, strides, features_in, features_out)
    taps = taps.transpose(0, 2, 1, 3, 4, 5)
    taps = taps.reshape(blocks, blocks, strides**2 * features_in, features_out)
    return _conv_valid(space_to_depth(_pad(x, (size - strides) // 2), strides), taps)


@jax.custom_vjp
def pointwise(x: _Images, kernel: _Kernel) -> _Images:
    """A convolution of kernel size 1."""
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])


def _pointwise_forward(x: _Images, kernel: _Kernel) -> tuple[_Images, tuple[_Images, _Kernel]]:
    return pointwise(x, kernel), (x, kernel)


def _pointwise_backward(
    inputs: tuple[_Images, _Kernel], gradient: _Images
) -> tuple[_Images, _Kernel]:
    x, kernel = inputs
    x_gradient = jnp.einsum("bhwo,io->bhwi", gradient, kernel[0, 0])
    # One product over all pixels takes XLA's threads longer than one product per row, summed.
    # Without the barrier XLA would fuse the transposition with what makes x.
    columns = lax.optimization_barrier(x.swapaxes(2, 3))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.einsum("bhiw,bhwo->bhio", columns, gradient, preferred_element_type=dtype)
    return x_gradient, products.sum((0, 1)).astype(kernel.dtype)[None, None]


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def conv_transpose(x: _Images, kernel: _Kernel) -> _Images:
    """A transposed convolution of stride 2; see `convolution.conv_transpose`."""
    # The two pixels of the output that lie between two neighbouring pixels of a row depend on these
    # two alone: on the left one through taps 1 and 0, on the right one through taps 3 and 2. The
    # same holds for columns.
    _, _, features_in, features_out = kernel.shape
    taps = kernel.reshape(2, 2, 2, 2, features_in, features_out)[:, ::-1, :, ::-1]
    taps = taps.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, features_in, 4 * features_out)
    # Padding by the convolution would make the gradient of its kernel far slower.
    return depth_to_space(_conv_valid(_pad(x, 1), taps), 2)[:, 1:-1, 1:-1]


def _conv_valid(x: _Images, kernel: _Kernel) -> _Images:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=DIMENSION_NUMBERS)


def _pad(x: _Images, padding: int) -> _Images:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
