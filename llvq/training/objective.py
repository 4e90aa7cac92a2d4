"""What training minimises: a weighted sum of losses, which validation and evaluation report too.

A loss is a function of a `Pair`, images and their reconstructions, and returns a loss per image.
Parameters with a range in their annotation are its options. `LOSSES["mine"] = mine` registers one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from llvq import fields
from llvq.models import VQVAE, Pair
from llvq.training.ssim import ssim

Metrics = dict[str, Float[Array, ""]]

# The weight of the quantizer's loss stands among those of LOSSES, under this name.
QUANTIZER = "quantizer"


def mse(pair: Pair) -> Float[Array, "batch"]:
    """Computes the mean squared error of each image."""
    return _mean_of_image((pair.reconstructions - pair.targets) ** 2)


def l1(pair: Pair) -> Float[Array, "batch"]:
    """Computes the mean absolute error of each image."""
    return _mean_of_image(jnp.abs(pair.reconstructions - pair.targets))


def ssim_loss(pair: Pair) -> Float[Array, "batch"]:
    """Computes 1 − SSIM of each image, on values mapped to [0, 1]."""
    return 1 - ssim(*pair.unit())


LOSSES: dict[str, Callable[..., Float[Array, "batch"]]] = {
    "mse": mse,
    "l1": l1,
    "ssim": ssim_loss,
}


def default_weights() -> dict[str, float]:
    """Returns the weight of every loss in a config that names none: the paper's objective."""
    return {**dict.fromkeys(LOSSES, 0.0), "mse": 1.0, QUANTIZER: 1.0}


def complete_weights(given: Any) -> dict[str, float]:
    """Returns the weight of every loss: those given, and the defaults of the others.

    Raises:
      UserError: if there is no such loss, or a weight is below 0.
    """
    fields.require(isinstance(given, Mapping), "loss", given, "a dict of weights")
    weights = default_weights()
    for name in given:
        fields.entry(weights, name, "loss")
    weights |= given
    fields.check(weights, dict.fromkeys(weights, fields.Number(0)), "loss.")
    return weights


def complete_options(given: Any) -> dict[str, dict[str, Any]]:
    """Returns all options of each loss that has any, completed likewise."""
    fields.require(isinstance(given, Mapping), "loss_options", given, "a dict of dicts")
    for name in given:
        fields.entry(LOSSES, name, "loss")
    completed = {
        name: fields.complete(loss, given.get(name, {}), f"loss_options.{name}.", name)
        for name, loss in LOSSES.items()
    }
    return {name: options for name, options in completed.items() if options}


class Objective(NamedTuple):
    """A weighted sum of losses.

    Attributes:
      weights: of each loss by name, the quantizer's included.
      options: of each loss that has options, by name.
    """

    weights: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]] = {}

    def __call__(
        self,
        model: VQVAE,
        images: Num[Array, "batch height width channels"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
        key: Key[Array, ""] | None = None,
        quantizer_weight: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Metrics, Pair]:
        """Computes the loss of some images.

        Args:
          model: reconstructs the images.
          images: uint8, or floats in the model's value range.
          train: whether the quantizer updates what it learns without gradients.
          mask: the images that count; all by default.
          key: for what is random in training.
          quantizer_weight: a further factor of the quantizer's loss, which rises in training.

        Returns:
          (loss, metrics, pair): the loss; the means over the images that count of `loss`,
          `reconstruction_loss`, `quantizer_loss` (without its weight), of the quantizer's metrics,
          and, where the reconstruction loss has several parts, of each part, e.g. `l1_loss`; and
          the images with their reconstructions.
        """
        pair = model.pair(images, train=train, mask=mask, key=key)
        parts = {
            name: _mean(LOSSES[name](pair, **self.options.get(name, {})), mask)
            for name, weight in self.weights.items()
            if weight and name != QUANTIZER
        }
        zero = jnp.zeros((), pair.targets.dtype)
        weighted = (self.weights[name] * part for name, part in parts.items())
        reconstruction_loss = sum(weighted, start=zero)
        metrics = {"reconstruction_loss": reconstruction_loss, "quantizer_loss": pair.loss}
        if len(parts) > 1:
            metrics |= {f"{name}_loss": part for name, part in parts.items()}
        weight: Any = self.weights[QUANTIZER]
        if quantizer_weight is not None:
            weight = metrics["quantizer_loss_weight"] = weight * quantizer_weight
        loss = reconstruction_loss + weight * pair.loss
        return loss, {"loss": loss, **metrics, **pair.metrics}, pair


def _mean_of_image(values: Float[Array, "batch ..."]) -> Float[Array, "batch"]:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _mean(values: Float[Array, "batch"], mask: Bool[Array, "batch"] | None) -> Float[Array, ""]:
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(values, where=mask) / jnp.maximum(jnp.sum(mask), 1)
