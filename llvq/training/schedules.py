"""Learning-rate schedules, by the names that configs use.

constant     the same rate throughout
first_epoch  the rate during the first epoch, exactly 0 afterwards: the authors' exponential decay
             with a factor of 0.0 per epoch. The statistics of vq_ema still move.
cosine       a linear rise to the rate over the first 5% of the steps, then half a cosine down to 0.
             It depends on the run's length: extending a finished run raises the rate again.
"""

import math

import optax

_WARM_UP = 0.05  # of a cosine's steps


def create(name: str, learning_rate: float, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    """The schedule of a name for a run: maps a step, counted from 0, to its learning rate."""
    if name == "cosine":
        # The first step takes 1/warm_up of the rate, not 0.
        warm_up = math.ceil(_WARM_UP * num_steps)
        return optax.warmup_cosine_decay_schedule(
            learning_rate / warm_up, learning_rate, max(warm_up - 1, 0), num_steps
        )
    constant = optax.constant_schedule(learning_rate)
    if name == "first_epoch":
        return optax.join_schedules([constant, optax.constant_schedule(0.0)], [steps_per_epoch])
    return constant


def num_active_steps(name: str, learning_rate: float, steps_per_epoch: int, num_steps: int) -> int:
    """After how many steps of a run the learning rate stays 0."""
    if not learning_rate:
        return 0
    return min(steps_per_epoch, num_steps) if name == "first_epoch" else num_steps
