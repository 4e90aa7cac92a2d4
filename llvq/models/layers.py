"""Convolutional layers with PyTorch's default initialisation, and the residual block of VQ-VAE.

PyTorch draws kernel and bias uniformly from ±1/sqrt(fan_in); keeping that makes training curves
comparable with the authors'. All images are NHWC, all kernels [height, width, in, out].
"""

import math

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import convolution


def _uniform(fan_in: int) -> nnx.Initializer:
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype, *_: jax.random.uniform(key, shape, dtype, -bound, bound)


def _add_bias(
    x: Float[Array, "batch h w c"], bias: Float[Array, "features"]
) -> Float[Array, "batch h w c"]:
    """Adds a bias to every pixel of images, packed or not."""
    return x + jnp.tile(bias.astype(x.dtype), x.shape[-1] // bias.shape[0])


class Conv(nnx.Module):
    """A convolution padded so that the output has 1/strides of the input's height and width."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        strides: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = _uniform(in_features * kernel_size**2)
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(init(rngs.params(), shape[-1:], param_dtype)) if use_bias else None
        self.strides = strides
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch h w c"], packing: int | None = None
    ) -> Float[Array, "batch h_out w_out c_out"]:
        """Packed, if at all, x by strides·packing and the result by packing (see `convolution`)."""
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        y = convolution.conv(x, kernel, self.strides, packing)
        return y if self.bias is None else _add_bias(y, self.bias[...])


class ConvTranspose(nnx.Module):
    """A transposed convolution, 4×4 with stride 2: exactly doubles height and width.

    PyTorch takes a transposed convolution's fan_in from its output channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = _uniform(out_features * 4 * 4)
        shape = (4, 4, in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(init(rngs.params(), shape[-1:], param_dtype))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch h w c"], packing: int | None = None
    ) -> Float[Array, "batch h_out w_out c_out"]:
        """Packed, if at all, x by packing and the result by 2·packing (see `convolution`)."""
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        return _add_bias(convolution.conv_transpose(x, kernel, packing), self.bias[...])


class ResidualBlock(nnx.Module):
    """x + conv1×1(relu(conv3×3(x))), both convolutions without bias."""

    def __init__(
        self, features: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        def conv_without_bias(kernel_size: int) -> Conv:
            return Conv(
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

    def __call__(
        self, x: Float[Array, "batch h w c"], packing: int | None = None
    ) -> Float[Array, "batch h w c"]:
        """Packed, if at all, x and the result by packing (see `convolution`)."""
        return x + self.conv1x1(nnx.relu(self.conv3x3(x, packing)), packing)
