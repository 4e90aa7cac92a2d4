"""Convolutions in the form that each backend runs fastest; images NHWC, kernels HWIO.

On a GPU XLA's own convolutions are used as they are. On a CPU some are slow, above all in the
gradients of their kernels: those of 1 × 1 are products of matrices there, and the others become
dense ones, of stride 1, by space-to-depth (stride 2) and depth-to-space (transposed). (What XLA is
told of convolutions on a CPU is in `sharding`.)

A TPU computes on 128 channels at once, and stores as many: of 3, 16 or 32 it wastes most. There
images are packed, blocks of p × p pixels into the channels of one, from the first layer to the
last, and so are the kernels: each becomes one of 3 × 3 blocks (1 × 1 of 1 × 1) that computes all
pixels of a block at once, with zeros where one does not depend on another. That multiplies the
arithmetic, of which there is little, and divides memory and traffic, of which there is much.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Shaped

_Images = Float[Array, "batch height width channels"]
_Kernel = Float[Array, "kernel_height kernel_width in out"]
_Function = Callable[[_Images, _Kernel], _Images]

_NHWC = ("NHWC", "HWIO", "NHWC")

_TPU_LANES = 128


def choose_packing(platform: str, latent_shape: Sequence[int], features: int) -> int | None:
    """How a network's images are best packed.

    Args:
      platform: of the devices: "cpu", "gpu" or "tpu".
      latent_shape: height and width of the network's smallest images, of what a device has of them.
      features: how many channels they have.

    Returns:
      How many pixels of those make a block each way; None if images are best not packed.
    """
    # With half of the lanes in use packing costs more than it gains, by the compiler's count: of
    # CelebA the traffic halves but the cycles grow, of FashionMNIST (larger kernels) both grow.
    if platform != "tpu" or 2 * features >= _TPU_LANES:
        return None
    packing = 1
    while packing**2 * features < _TPU_LANES and all(n % (2 * packing) == 0 for n in latent_shape):
        packing *= 2
    return packing


def pack(
    x: Shaped[Array, "batch height width channels"], packing: int
) -> Shaped[Array, "batch h w packed_channels"]:
    """Images with blocks of packing × packing pixels as the channels of one.

    Height and width must be multiples of packing. Integers are packed before anything is made of
    them, while they are small.
    """
    return lax.optimization_barrier(_space_to_depth(x, packing))


def unpack(
    x: Shaped[Array, "batch h w packed_channels"], packing: int
) -> Shaped[Array, "batch height width channels"]:
    """The images that were packed."""
    return _depth_to_space(x, packing)


def conv(x: _Images, kernel: _Kernel, strides: int, packing: int | None = None) -> _Images:
    """A convolution of zero-padded images.

    Args:
      x: [batch, height, width, in], height and width multiples of `strides`; or that packed by
        strides·packing.
      kernel: [size, size, in, out]; size must be a multiple of strides, size - strides even.
      strides: of the output's pixels in the input.
      packing: of the result, None for images that are not packed.

    Returns:
      [batch, height / strides, width / strides, out]; or that packed.
    """
    if packing is not None:
        padding = _padding(kernel, strides)
        return _conv_packed(
            x, kernel, strides * packing, packing, lambda out, tap: strides * out + tap - padding
        )
    plain = functools.partial(_conv, strides=strides)
    if kernel.shape[0] == 1:  # strides can only be 1
        return _by_platform(x, kernel, _pointwise_on_cpu, plain)
    if strides > 1:
        return _by_platform(
            x, kernel, functools.partial(_conv_strided_on_cpu, strides=strides), plain
        )
    return plain(x, kernel)


def conv_transpose(x: _Images, kernel: _Kernel, packing: int | None = None) -> _Images:
    """A transposed convolution of stride 2, as `jax.lax.conv_transpose` with padding "SAME".

    Args:
      x: [batch, height, width, in]; or that packed.
      kernel: [4, 4, in, out].
      packing: of x, None for images that are not packed.

    Returns:
      [batch, 2·height, 2·width, out]; or that packed by 2·packing.
    """
    if packing is not None:
        return _conv_packed(x, kernel, packing, 2 * packing, lambda out, tap: (out + tap - 2) / 2)
    return _by_platform(x, kernel, _conv_transpose_on_cpu, _conv_transpose)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_platform(x: _Images, kernel: _Kernel, cpu: _Function, default: _Function) -> _Images:
    """One of two equal functions, chosen when it is lowered for a platform; so its gradient."""
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


def _padding(kernel: _Kernel, strides: int) -> int:
    return (kernel.shape[0] - strides) // 2


def _conv(x: _Images, kernel: _Kernel, strides: int) -> _Images:
    padding = _padding(kernel, strides)
    return lax.conv_general_dilated(
        x, kernel, (strides,) * 2, ((padding,) * 2,) * 2, dimension_numbers=_NHWC
    )


def _conv_valid(x: _Images, kernel: _Kernel) -> _Images:
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=_NHWC)


def _pad(x: _Images, padding: int) -> _Images:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _conv_strided_on_cpu(x: _Images, kernel: _Kernel, strides: int) -> _Images:
    size, _, features_in, features_out = kernel.shape
    blocks = size // strides
    taps = kernel.reshape(blocks, strides, blocks, strides, features_in, features_out)
    taps = taps.transpose(0, 2, 1, 3, 4, 5)
    taps = taps.reshape(blocks, blocks, strides**2 * features_in, features_out)
    return _conv_valid(_space_to_depth(_pad(x, _padding(kernel, strides)), strides), taps)


@jax.custom_vjp
def _pointwise_on_cpu(x: _Images, kernel: _Kernel) -> _Images:
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])


def _pointwise_forward(x: _Images, kernel: _Kernel) -> tuple[_Images, tuple[_Images, _Kernel]]:
    return _pointwise_on_cpu(x, kernel), (x, kernel)


def _pointwise_backward(
    inputs: tuple[_Images, _Kernel], gradient: _Images
) -> tuple[_Images, _Kernel]:
    x, kernel = inputs
    x_gradient = jnp.einsum("bhwo,io->bhwi", gradient, kernel[0, 0])
    # One product over all pixels takes XLA's threads longer than one for each row, summed. The
    # barrier: the transposition would be fused with what makes x.
    columns = lax.optimization_barrier(x.swapaxes(2, 3))
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # of the sums
    products = jnp.einsum("bhiw,bhwo->bhio", columns, gradient, preferred_element_type=dtype)
    return x_gradient, products.sum((0, 1)).astype(kernel.dtype)[None, None]


_pointwise_on_cpu.defvjp(_pointwise_forward, _pointwise_backward)


def _conv_transpose(x: _Images, kernel: _Kernel) -> _Images:
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=_NHWC)


def _conv_transpose_on_cpu(x: _Images, kernel: _Kernel) -> _Images:
    # Two neighbouring pixels of a row are all that two pixels of the output between them depend
    # on: the left one through taps 1 and 0, the right one through taps 3 and 2; so for columns.
    _, _, features_in, features_out = kernel.shape
    taps = kernel.reshape(2, 2, 2, 2, features_in, features_out)[:, ::-1, :, ::-1]
    taps = taps.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, features_in, 4 * features_out)
    # Padded here, not by the convolution: its kernel's gradient would take far longer.
    return _depth_to_space(_conv_valid(_pad(x, 1), taps), 2)[:, 1:-1, 1:-1]


def _conv_packed(
    x: _Images,
    kernel: _Kernel,
    packing_in: int,
    packing_out: int,
    source: Callable[[int, int], float],
) -> _Images:
    """A convolution of packed images, to packed images of as many blocks.

    Args:
      x: packed by packing_in.
      kernel: as for images that are not packed.
      packing_in: how many pixels of x a block has each way.
      packing_out: how many of the result.
      source: where in x the pixel lies, counted from the beginning of its block, that a pixel of
        the result in that block depends on through a tap; between pixels if there is none.
    """
    size, _, _, features_out = kernel.shape
    places = [
        (*divmod(int(source(out, tap)), packing_in), out, tap)
        for out in range(packing_out)
        for tap in range(size)
        if source(out, tap) == int(source(out, tap))
    ]
    first, last = min(places)[0], max(places)[0]
    selected = np.zeros((last - first + 1, packing_in, packing_out, size), kernel.dtype)
    for block, pixel, out, tap in places:
        selected[block - first, pixel, out, tap] = 1
    blocks = jnp.einsum(
        *("AIOt,BJPu,tucd->ABIJcOPd", selected, selected, kernel),
        # Every element is one of the kernel's, or 0: exact if float32 is not cut to bfloat16.
        precision=lax.Precision.HIGHEST,
    )
    shape = len(selected), len(selected), x.shape[-1], packing_out**2 * features_out
    return lax.conv_general_dilated(
        x, blocks.reshape(shape), (1, 1), ((-first, last),) * 2, dimension_numbers=_NHWC
    )


def _space_to_depth(x: _Images, size: int) -> _Images:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size**2 * channels)


def _depth_to_space(x: _Images, size: int) -> _Images:
    batch, height, width, channels = x.shape
    channels //= size**2
    x = x.reshape(batch, height, width, size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, channels)
