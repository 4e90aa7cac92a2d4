"""Convolutional layers with PyTorch's default initialisation, and the residual block of VQ-VAE.

PyTorch draws kernel and bias uniformly from ±1/sqrt(fan_in); keeping that makes training curves
comparable with the authors'. All images are NHWC, all kernels [height, width, in, out].
"""

import functools
import math
from collections.abc import Callable

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.models import convolution

# What may end a network: the paper's LeakyReLU of slope 0.01, or nothing.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "leaky_relu": nnx.leaky_relu,
    "none": lambda x: x,
}


def _uniform(fan_in: int) -> nnx.Initializer:
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype, *_: jax.random.uniform(key, shape, dtype, -bound, bound)


def _add_bias(
    x: Float[Array, "batch h w c"], bias: Float[Array, "features"]
) -> Float[Array, "batch h w c"]:
    """Adds a bias to every pixel of images, packed or not."""
    return x + jnp.tile(bias.astype(x.dtype), x.shape[-1] // bias.shape[0])


class Conv(nnx.Module):
    """A convolution padded so that the output has 1/strides of the input's height and width.

    Attributes:
      features: the number of output channels.
      scale: the height of the output over that of the network's latents.
      packing: how the network's latents are packed; None if images are not packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        strides: int = 1,
        scale: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = _uniform(in_features * kernel_size**2)
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(init(rngs.params(), shape[-1:], param_dtype)) if use_bias else None
        self.features = out_features
        self.strides = strides
        self.scale = scale
        self.packing: int | None = None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h_out w_out c_out"]:
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        y = convolution.conv(x, kernel, self.strides, self.packing and self.packing * self.scale)
        return y if self.bias is None else _add_bias(y, self.bias[...])


class ConvTranspose(nnx.Module):
    """A transposed convolution, 4×4 with stride 2: exactly doubles height and width.

    PyTorch takes a transposed convolution's fan_in from its output channels.

    Attributes:
      scale: the height of the input over that of the network's latents.
      packing: how the network's latents are packed; None if images are not packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: int = 1,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = _uniform(out_features * 4 * 4)
        shape = (4, 4, in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(init(rngs.params(), shape[-1:], param_dtype))
        self.scale = scale
        self.packing: int | None = None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h_out w_out c_out"]:
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        y = convolution.conv_transpose(x, kernel, self.packing and self.packing * self.scale)
        return _add_bias(y, self.bias[...])


class ResidualBlock(nnx.Module):
    """x + conv1×1(relu(conv3×3(x))), both convolutions without bias."""

    def __init__(
        self, features: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        conv = functools.partial(
            Conv,
            features,
            features,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.conv3x3 = conv(kernel_size=3)
        self.conv1x1 = conv(kernel_size=1)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return x + self.conv1x1(nnx.relu(self.conv3x3(x)))
