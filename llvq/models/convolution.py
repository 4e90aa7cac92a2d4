"""Convolutions in the form that each backend runs fastest; images NHWC, kernels HWIO.

A CPU has forms of its own (`convolution_cpu`), a TPU may compute on packed images (`packing`), a
GPU gets those that cuDNN has. `runtime.sharding` has the options that go with them.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float

from llvq.models import convolution_cpu
from llvq.models.packing import DIMENSION_NUMBERS, conv_packed

_Images = Float[Array, "batch height width channels"]
_Kernel = Float[Array, "kernel_height kernel_width in out"]
_Function = Callable[[_Images, _Kernel], _Images]


def conv(x: _Images, kernel: _Kernel, strides: int, packing: int | None = None) -> _Images:
    """A convolution of zero-padded images.

    Args:
      x: [batch, height, width, in], height and width multiples of `strides`; or such images packed
        by strides·packing.
      kernel: [size, size, in, out]; size must be a multiple of strides, size - strides even.
      strides: how many pixels of the input lie between neighbouring pixels of the output.
      packing: how the result is packed; None for images that are not packed.

    Returns:
      [batch, height / strides, width / strides, out]; or such images packed.
    """
    if packing is not None:
        padding = (kernel.shape[0] - strides) // 2
        return conv_packed(
            x, kernel, strides * packing, packing, lambda out, tap: strides * out + tap - padding
        )
    plain = functools.partial(_conv, strides=strides)
    if kernel.shape[0] == 1:  # strides can only be 1
        return _by_platform(x, kernel, convolution_cpu.pointwise, plain)
    if strides > 1:
        dense = functools.partial(convolution_cpu.conv_strided, strides=strides)
        return _by_platform(x, kernel, dense, plain)
    return plain(x, kernel)


def conv_transpose(x: _Images, kernel: _Kernel, packing: int | None = None) -> _Images:
    """A transposed convolution of stride 2, as `jax.lax.conv_transpose` with padding "SAME".

    Args:
      x: [batch, height, width, in]; or such images packed.
      kernel: [4, 4, in, out].
      packing: how x is packed; None for images that are not packed.

    Returns:
      [batch, 2·height, 2·width, out]; or such images packed by 2·packing.
    """
    if packing is not None:
        return conv_packed(x, kernel, packing, 2 * packing, lambda out, tap: (out + tap - 2) / 2)
    return _by_platform(x, kernel, convolution_cpu.conv_transpose, _conv_transpose)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_platform(x: _Images, kernel: _Kernel, cpu: _Function, default: _Function) -> _Images:
    """One of two equal functions, and its gradient, chosen when it is lowered for a platform."""
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _by_platform_forward(
    x: _Images, kernel: _Kernel, cpu: _Function, default: _Function
) -> tuple[_Images, tuple[_Images, _Kernel]]:
    return _by_platform(x, kernel, cpu, default), (x, kernel)


def _by_platform_backward(
    cpu: _Function, default: _Function, inputs: tuple[_Images, _Kernel], gradient: _Images
) -> tuple[_Images, _Kernel]:
    def pull_back(function: _Function) -> Callable[..., tuple[_Images, _Kernel]]:
        return lambda x, kernel, gradient: jax.vjp(function, x, kernel)[1](gradient)

    return lax.platform_dependent(*inputs, gradient, cpu=pull_back(cpu), default=pull_back(default))


_by_platform.defvjp(_by_platform_forward, _by_platform_backward)


def _conv(x: _Images, kernel: _Kernel, strides: int) -> _Images:
    padding = (kernel.shape[0] - strides) // 2
    return lax.conv_general_dilated(
        x, kernel, (strides,) * 2, ((padding,) * 2,) * 2, dimension_numbers=DIMENSION_NUMBERS
    )


def _flipped(kernel: _Kernel) -> _Kernel:
    """The kernel of the strided convolution whose transpose `_conv_transpose` is."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


@jax.custom_vjp
def _conv_transpose(x: _Images, kernel: _Kernel) -> _Images:
    """A transposed convolution as the gradient of a strided one, which cuDNN has a kernel for.

    XLA would otherwise compute the gradient of its kernel as a convolution whose own kernel is a
    whole image.
    """
    batch, height, width, _ = x.shape
    y = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, kernel.shape[3]), x.dtype)
    kernel = _flipped(kernel)
    return jax.linear_transpose(lambda y: _conv(y, kernel, 2), y)(x)[0]


def _conv_transpose_forward(x: _Images, kernel: _Kernel) -> tuple[_Images, tuple[_Images, _Kernel]]:
    return _conv_transpose(x, kernel), (x, kernel)


def _conv_transpose_backward(
    inputs: tuple[_Images, _Kernel], gradient: _Images
) -> tuple[_Images, _Kernel]:
    x, kernel = inputs
    x_gradient, pull_back = jax.vjp(lambda kernel: _conv(gradient, _flipped(kernel), 2), kernel)
    return x_gradient, *pull_back(x)


_conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)
