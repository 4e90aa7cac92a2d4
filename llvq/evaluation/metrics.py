"""Metrics of reconstructions. A new one is one entry of METRICS; result tables derive from it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from llvq.models import Pair
from llvq.training import objective
from llvq.training.ssim import Images, ssim

# An exact reconstruction counts as one with this mean squared error, 100 dB, instead of making the
# mean over a split infinite.
_SMALLEST_MSE = 1e-10


class Metric(NamedTuple):
    """Attributes:
    of_images: maps (pair, its images in [0, 1], its reconstructions clipped to [0, 1]) to the
      metric of each image, [batch].
    finish: maps the mean over a split's images to the figure that is reported.
    title: of its column in a table.
    digits: how a table formats it.
    """

    of_images: Callable[[Pair, Images, Images], Float[Array, "batch"]]
    finish: Callable[[float], float]
    title: str
    digits: str

    def text(self, value: float | None) -> str:
        """The figure in a table; empty if it was not finite."""
        return "" if value is None else f"{value:{self.digits}}"


def mse(originals: Images, reconstructions: Images) -> Float[Array, "batch"]:
    """Mean squared error of each image pair."""
    return jnp.mean((reconstructions - originals) ** 2, axis=(1, 2, 3))


def psnr(originals: Images, reconstructions: Images) -> Float[Array, "batch"]:
    """Peak signal-to-noise ratio of each image pair in [0, 1], in dB, at most 100."""
    return -10.0 * jnp.log10(jnp.maximum(mse(originals, reconstructions), _SMALLEST_MSE))


def _mean(mean: float) -> float:
    return mean


METRICS: dict[str, Metric] = {
    "mse": Metric(lambda pair, *_: objective.mse(pair), _mean, "MSE", ".5f"),
    "psnr": Metric(lambda _, *images: psnr(*images), _mean, "PSNR", ".2f"),
    "ssim": Metric(lambda _, *images: ssim(*images), _mean, "SSIM", ".3f"),
}


def sums(pair: Pair, mask: Bool[Array, "batch"]) -> dict[str, Float[Array, ""]]:
    """Sums each metric over the images that the mask lets count."""
    images, reconstructions = pair.unit()
    reconstructions = jnp.clip(reconstructions, 0.0, 1.0)
    return {
        name: jnp.sum(metric.of_images(pair, images, reconstructions), where=mask)
        for name, metric in METRICS.items()
    }


def finish(totals: Mapping[str, float], num_images: int) -> dict[str, float]:
    """Makes the figures of a split from the sums of metrics and losses over its images."""
    means = {name: total / num_images for name, total in totals.items()}
    return {
        name: METRICS[name].finish(mean) if name in METRICS else mean
        for name, mean in means.items()
    }
