"""Image quality: PSNR and SSIM, on images mapped to [0, 1] and clipped."""

import dm_pix
import jax
from jax import numpy as jnp
from jaxtyping import Array, Float


def to_unit_range(
    images: Float[Array, "batch height width channels"], value_range: tuple[float, float]
) -> Float[Array, "batch height width channels"]:
    """Maps a value range to [0, 1] and clips to it."""
    low, high = value_range
    return jnp.clip((images - low) / (high - low), 0.0, 1.0)


def psnr(
    a: Float[Array, "batch height width channels"], b: Float[Array, "batch height width channels"]
) -> Float[Array, "batch"]:
    """Peak signal-to-noise ratio of each image pair in dB; infinite for equal images."""
    return jax.vmap(dm_pix.psnr)(a, b)


def ssim(
    a: Float[Array, "batch height width channels"], b: Float[Array, "batch height width channels"]
) -> Float[Array, "batch"]:
    """Structural similarity of each image pair (Wang et al. 2004; Gaussian window 11, σ = 1.5)."""
    return jax.vmap(dm_pix.ssim)(a, b)
