"""Convolutions with PyTorch's default initialisation, and the residual block of VQ-VAE.

PyTorch draws kernel and bias uniformly from ±1/sqrt(fan_in); keeping that makes training curves
comparable with the authors'. All images are NHWC, all kernels [height, width, in, out].
"""

import math

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _uniform(fan_in: int) -> nnx.Initializer:
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype, *_: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    strides: int = 1,
    use_bias: bool = True,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution padded so that the output has 1/strides of the input's height and width."""
    init = _uniform(in_features * kernel_size**2)
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=strides,
        padding=(kernel_size - strides + 1) // 2,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        bias_init=init,
        rngs=rngs,
    )


def conv_transpose(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.ConvTranspose:
    """A transposed convolution, 4×4 with stride 2: exactly doubles height and width.

    PyTorch takes a transposed convolution's fan_in from its output channels.
    """
    init = _uniform(out_features * 4 * 4)
    return nnx.ConvTranspose(
        in_features,
        out_features,
        (4, 4),
        strides=2,
        padding="SAME",
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        bias_init=init,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """x + conv1×1(relu(conv3×3(x))), both convolutions without bias."""

    def __init__(
        self, features: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        def conv_without_bias(kernel_size: int) -> nnx.Conv:
            return conv(
                features,
                features,
                kernel_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.conv3x3 = conv_without_bias(3)
        self.conv1x1 = conv_without_bias(1)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return x + self.conv1x1(nnx.relu(self.conv3x3(x)))
