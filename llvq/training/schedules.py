"""Learning-rate schedules, by the names that configs use.

constant         the same rate throughout
first_epoch      the rate during the first epoch, exactly 0 afterwards: the authors' exponential
                 decay with a factor of 0.0 per epoch. The statistics of vq_ema still move.
warmup           a linear rise to the rate over the first 5% of the steps, then constant
cosine           the same rise, then half a cosine down to 0
linear           the same rise, then a line down to 0
exponential      the same rise, then an exponential decay to a hundredth of the rate

All but the first two depend on the run's length: extending a finished run raises the rate again.
`SCHEDULES["mine"] = mine` registers another.
"""

import math
from collections.abc import Callable

import optax

_WARM_UP = 0.05  # of the steps
_LAST_SHARE = 0.01  # of the rate, where an exponential decay ends


def _constant(rate: float, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    del steps_per_epoch, num_steps
    return optax.constant_schedule(rate)


def _first_epoch(rate: float, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    del num_steps
    both = [optax.constant_schedule(rate), optax.constant_schedule(0.0)]
    return optax.join_schedules(both, [steps_per_epoch])


def _after_warmup(
    decay: Callable[[float, int], optax.Schedule],
) -> Callable[[float, int, int], optax.Schedule]:
    """A schedule of a linear rise and what follows it, a function of (rate, number of steps)."""

    def create(rate: float, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
        del steps_per_epoch
        # The first step takes 1/warm_up of the rate, not 0.
        warm_up = math.ceil(_WARM_UP * num_steps)
        steps_up = max(warm_up - 1, 0)
        rise = optax.linear_schedule(rate / warm_up, rate, steps_up)
        return optax.join_schedules([rise, decay(rate, num_steps - steps_up)], [steps_up])

    return create


# Maps (learning rate, steps per epoch, steps in all) to an optax schedule.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "constant": _constant,
    "first_epoch": _first_epoch,
    "warmup": _after_warmup(lambda rate, _: optax.constant_schedule(rate)),
    "cosine": _after_warmup(optax.cosine_decay_schedule),
    "linear": _after_warmup(lambda rate, steps: optax.linear_schedule(rate, 0.0, steps)),
    "exponential": _after_warmup(
        lambda rate, steps: optax.exponential_decay(rate, steps, _LAST_SHARE)
    ),
}


def num_active_steps(name: str, learning_rate: float, steps_per_epoch: int, num_steps: int) -> int:
    """Returns after how many steps of a run the learning rate stays 0."""
    if not learning_rate:
        return 0
    return min(steps_per_epoch, num_steps) if name == "first_epoch" else num_steps
