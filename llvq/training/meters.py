"""Means and rates of the steps between two logs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llvq.errors import DivergenceError


class MetricsWindow:
    """Means of the steps' metrics since the last log.

    It reads them one call late, so as not to wait for the device.

    Attributes:
      latest: the last value of each metric that has been read.
    """

    def __init__(self, describe_last_checkpoint: Callable[[], str]) -> None:
        """Args:
        describe_last_checkpoint: says which checkpoint a run that diverged can resume from.
        """
        self._describe_last_checkpoint = describe_last_checkpoint
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._values: dict[str, list[float]] = {}
        self.latest: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a call of one step or several, up to the step of that number.

        Raises:
          DivergenceError: if a step of the call before it diverged.
        """
        self.read()
        self._waiting = step, metrics

    def read(self) -> None:
        """Waits for the last call.

        Raises:
          DivergenceError: if a metric is NaN or infinite.
        """
        if self._waiting is None:
            return
        last_step, metrics = self._waiting
        self._waiting = None
        by_step = {name: np.atleast_1d(values) for name, values in jax.device_get(metrics).items()}
        num_steps = len(by_step["loss"])
        for i, step in enumerate(range(last_step - num_steps + 1, last_step + 1)):
            for name, values in by_step.items():
                if not np.isfinite(values[i]):
                    raise DivergenceError(
                        f"{name} is {values[i]} at step {step}: stopped; "
                        f"{self._describe_last_checkpoint()}"
                    )
                self.latest[name] = float(values[i])
                self._values.setdefault(name, []).append(self.latest[name])

    def finish(self) -> dict[str, float]:
        """The mean of each metric over the steps that had it; the window starts anew.

        The learning rate is that of the last step.
        """
        means = {name: float(np.mean(values)) for name, values in self._values.items()}
        means |= {name: value for name, value in self.latest.items() if name == "learning_rate"}
        self._values = {}
        return means


class Throughput:
    """Steps and images per second; evaluation, checkpoints and compilation do not count."""

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._start: float | None = None
        self._steps = 0

    def count(self, num_steps: int) -> None:
        """Counts steps that are done; the first ones only start the clock, since they compile."""
        if self._start is None:
            self._start = time.monotonic()
        else:
            self._steps += num_steps

    def finish(self) -> dict[str, float]:
        """The rates since the last reading, if there were steps."""
        if self._start is None or not self._steps:
            return {}
        rate = self._steps / (time.monotonic() - self._start)
        self.restart()
        return {"steps_per_second": rate, "images_per_second": rate * self._images_per_step}

    def restart(self) -> None:
        """Leaves out the time since the last step."""
        self._start, self._steps = time.monotonic(), 0
