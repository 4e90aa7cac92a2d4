"""Optimizers, by the names that configs use.

An optimizer is a function of a learning-rate schedule that returns an optax.GradientTransformation.
Parameters with a range in their annotation are its options; they become fields of
config.optimizer. `OPTIMIZERS["mine"] = mine` registers one.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import optax

from llvq.fields import Number

# How much of an average a step keeps.
Decay = Annotated[float, Number(0, 1, excluded=1)]
Positive = Annotated[float, Number(0, excluded=0)]
WeightDecay = Annotated[float, Number(0)]


def adam(
    learning_rate: optax.Schedule, *, b1: Decay = 0.9, b2: Decay = 0.999, eps: Positive = 1e-8
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2014, arXiv 1412.6980)."""
    return optax.adam(learning_rate, b1, b2, eps)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: Positive = 1e-8,
    weight_decay: WeightDecay = 1e-4,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101)."""
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)


def lion(
    learning_rate: optax.Schedule,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.99,
    weight_decay: WeightDecay = 1e-3,
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675); it needs a smaller learning rate than Adam."""
    return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay)


def sgd(learning_rate: optax.Schedule, *, momentum: Decay = 0.9) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum."""
    return optax.sgd(learning_rate, momentum)


def adafactor(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor, whose state is small (Shazeer and Stern 2018, arXiv 1804.04235)."""
    return optax.adafactor(learning_rate)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "sgd": sgd,
    "adafactor": adafactor,
}


def create(
    name: str, options: Mapping[str, Any], learning_rate: optax.Schedule, clip_norm: float = 0.0
) -> optax.GradientTransformation:
    """Makes the optimizer of a name.

    Args:
      name: of `OPTIMIZERS`.
      options: of that optimizer.
      learning_rate: maps a step, counted from 0, to its learning rate.
      clip_norm: the largest norm of a gradient, beyond which it is scaled down; 0: no limit.
    """
    optimizer = OPTIMIZERS[name](learning_rate, **options)
    if not clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
