"""Structural similarity, in a form that is fast on TPUs."""

import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

_WINDOW = 11  # pixels; config.py refuses smaller images
_SIGMA = 1.5  # pixels
_C1, _C2 = 0.01**2, 0.03**2
_TILE = 128  # the width of a TPU's matrix unit

Images = Float[Array, "batch height width channels"]


def ssim(originals: Images, reconstructions: Images) -> Float[Array, "batch"]:
    """The structural similarity of each image pair in [0, 1], over all channels.

    Source: Wang et al., "Image quality assessment" (2004): a Gaussian window of 11 pixels with
    σ = 1.5, where it lies within the image.

    Images are reshaped to [height, width · channels] to fill a TPU's vectors, and the window is
    applied as products with band matrices.
    """
    batch, height, _, channels = originals.shape
    # Values are centred at 0, because small variances then lose less to rounding.
    a, b = (images.reshape(batch, height, -1) - 0.5 for images in (originals, reconstructions))
    a, b, squares, products = (
        _blur(_blur(values, 1, 1), 2, channels) for values in (a, b, a * a + b * b, a * b)
    )
    covariance, variances = products - a * b, squares - a * a - b * b
    a, b = a + 0.5, b + 0.5
    luminance = (2 * a * b + _C1) / (a * a + b * b + _C1)
    structure = (2 * covariance + _C2) / (variances + _C2)
    return jnp.mean(luminance * structure, axis=(1, 2))


def _blur(
    values: Float[Array, "batch rows columns"], axis: int, stride: int
) -> Float[Array, "batch rows columns"]:
    """Gaussian means of _WINDOW entries along an axis, `stride` apart; it becomes shorter."""
    reach = (_WINDOW - 1) * stride
    total = values.shape[axis] - reach
    length = min(total, max(_TILE, 2 * reach) - reach)  # means per tile
    band = np.zeros((length, length + reach), values.dtype)
    distances = (np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA
    weights = np.exp(-0.5 * distances**2)
    for offset, weight in enumerate(weights / weights.sum()):
        band += weight * np.eye(length, length + reach, offset * stride, values.dtype)
    tiles = []
    for start in range(0, total, length):
        first = min(start, total - length)  # the last tile begins earlier, to be as long
        tile = lax.slice_in_dim(values, first, first + length + reach, axis=axis)
        if axis == 1:
            means = jnp.moveaxis(jnp.tensordot(band, tile, (1, 1), precision="highest"), 0, 1)
        else:
            means = jnp.tensordot(tile, band, (2, 1), precision="highest")
        tiles.append(lax.slice_in_dim(means, start - first, length, axis=axis))
    return jnp.concatenate(tiles, axis=axis)
