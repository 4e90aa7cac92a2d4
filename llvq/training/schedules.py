"""Learning-rate schedules, by the names that configs use.

constant     the same rate throughout
first_epoch  the rate during the first epoch, exactly 0 afterwards: the authors' exponential decay
             with a factor of 0.0 an epoch; what is learnt without gradients (vq_ema) goes on
cosine       a linear rise to the rate over the first 5% of the steps, then half a cosine down to 0;
             it depends on the run's length, so that extending a finished run raises the rate again
"""

import math

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jaxtyping import Float

SCHEDULES = ("constant", "first_epoch", "cosine")

_WARM_UP = 0.05  # of a cosine's steps


def create(name: str, learning_rate: float, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    """The schedule of a name for a run: maps a step, counted from 0, to its learning rate."""
    constant = optax.constant_schedule(learning_rate)
    if name == "first_epoch":
        return optax.join_schedules([constant, optax.constant_schedule(0.0)], [steps_per_epoch])
    if name == "cosine":
        # The first step already moves: it takes 1/warm_up of the rate, not 0.
        warm_up = math.ceil(_WARM_UP * num_steps)
        return optax.warmup_cosine_decay_schedule(
            learning_rate / warm_up, learning_rate, max(warm_up - 1, 0), num_steps
        )
    return constant


def tabulate(schedule: optax.Schedule, num_steps: int) -> Float[np.ndarray, "num_steps"]:
    """The learning rate of every step, on the host: reading it costs no trip to the device."""
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(num_steps))
    return np.asarray(rates)
