"""Packed images, for a TPU: blocks of p × p pixels become the channels of one pixel.

A TPU computes on 128 channels at once, and stores as many: of 3, 16 or 32 it wastes most. There
images are packed from the first layer to the last, and so are the kernels: each becomes one of
3 × 3 blocks (1 × 1 of 1 × 1) that computes all pixels of a block at once, with zeros where a pixel
does not depend on another. That multiplies the arithmetic, of which there is little, and divides
memory and traffic, of which there is much.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Shaped

_Images = Float[Array, "batch height width channels"]
_Kernel = Float[Array, "kernel_height kernel_width in out"]

# The layouts of images, kernels and results, for jax.lax.
DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")

_TPU_LANES = 128


def choose(platform: str, latent_shape: Sequence[int], features: int) -> int | None:
    """How a network's images are best packed.

    Args:
      platform: "cpu", "gpu" or "tpu".
      latent_shape: (height, width) of a device's share of the network's smallest images.
      features: how many channels those have.

    Returns:
      The height and width of a block of their pixels; None if images are best left unpacked.
    """
    # Where half of the lanes are in use, packing costs more than it gains, by the compiler's count:
    # for CelebA the traffic halves but the cycles grow, for FashionMNIST both grow.
    if platform != "tpu" or 2 * features >= _TPU_LANES:
        return None
    packing = 1
    while packing**2 * features < _TPU_LANES and all(n % (2 * packing) == 0 for n in latent_shape):
        packing *= 2
    return packing


def pack(
    x: Shaped[Array, "batch height width channels"], packing: int
) -> Shaped[Array, "batch h w packed_channels"]:
    """Images whose blocks of packing × packing pixels have become the channels of one pixel.

    Height and width must be multiples of packing.
    """
    # With the barrier, integers are packed while they are small.
    return lax.optimization_barrier(space_to_depth(x, packing))


def unpack(
    x: Shaped[Array, "batch h w packed_channels"], packing: int
) -> Shaped[Array, "batch height width channels"]:
    """The images that were packed."""
    return depth_to_space(x, packing)


def pack_vectors(
    x: Shaped[Array, "batch height width ..."], packing: int
) -> Shaped[Array, "batch h w block ..."]:
    """Latents or codes in blocks: [batch, height / packing, width / packing, packing², ...]."""
    packed = space_to_depth(x.reshape(*x.shape[:3], -1), packing)
    return packed.reshape(*packed.shape[:3], packing**2, *x.shape[3:])


def unpack_vectors(
    x: Shaped[Array, "batch h w block ..."], packing: int
) -> Shaped[Array, "batch height width ..."]:
    """The inverse of `pack_vectors`."""
    plain = depth_to_space(x.reshape(*x.shape[:3], -1), packing)
    return plain.reshape(*plain.shape[:3], *x.shape[4:])


def conv_packed(
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
      packing_in: the height and width of a block, in pixels of x.
      packing_out: the same in pixels of the result.
      source: maps (output pixel, tap) to the input pixel read, both counted from the beginning of
        the block; fractional if there is none.
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
    # Every element is one of the kernel's, or 0: exact as long as float32 is not cut to bfloat16.
    exact = lax.Precision.HIGHEST
    blocks = jnp.einsum("AIOt,BJPu,tucd->ABIJcOPd", selected, selected, kernel, precision=exact)
    shape = len(selected), len(selected), x.shape[-1], packing_out**2 * features_out
    return lax.conv_general_dilated(
        x, blocks.reshape(shape), (1, 1), ((-first, last),) * 2, dimension_numbers=DIMENSION_NUMBERS
    )


def space_to_depth(x: _Images, size: int) -> _Images:
    """[batch, height, width, c] to [batch, height / size, width / size, size²·c]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size**2 * channels)


def depth_to_space(x: _Images, size: int) -> _Images:
    """[batch, height, width, size²·c] to [batch, height·size, width·size, c]."""
    batch, height, width, channels = x.shape
    channels //= size**2
    x = x.reshape(batch, height, width, size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, channels)
