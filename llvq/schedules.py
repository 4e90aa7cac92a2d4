"""Learning-rate schedules, by the names that configs use."""

from collections.abc import Callable

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jaxtyping import Float

SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    # The same rate throughout.
    "constant": lambda rate, num_steps, epoch: optax.constant_schedule(rate),
    # The rate during the first epoch, exactly 0 afterwards: the authors' exponential decay with a
    # factor of 0.0 an epoch. What is learnt without gradients (vq_ema) goes on.
    "first_epoch": lambda rate, num_steps, epoch: optax.join_schedules(
        [optax.constant_schedule(rate), optax.constant_schedule(0.0)], [epoch]
    ),
    # From the rate to 0 along half a cosine.
    "cosine": lambda rate, num_steps, epoch: optax.cosine_decay_schedule(rate, num_steps),
}


def create(name: str, learning_rate: float, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The schedule of a name, for a run of num_steps."""
    return SCHEDULES[name](learning_rate, num_steps, steps_per_epoch)


def tabulate(schedule: optax.Schedule, num_steps: int) -> Float[np.ndarray, "num_steps"]:
    """The learning rate of every step, on the host: reading it costs no trip to the device."""
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(num_steps))
    return np.asarray(rates)
