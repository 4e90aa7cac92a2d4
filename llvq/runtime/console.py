"""Metrics and progress in the console, for runs with and without TensorBoard.

Both classes have the interface of their counterparts in clu (a MetricWriter, a PeriodicAction),
so that main.py can hand in clu's and a run without TensorFlow can do without them.
"""

import time
from collections.abc import Mapping
from typing import Any

from absl import logging

_EVERY_SECONDS = 10.0


class ConsoleWriter:
    """A metric writer that prints scalars, one line a step, and nothing else."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Prints e.g. "[50] train/loss=0.0312 train/learning_rate=0.001"."""
        values = " ".join(f"{name}={value:.4g}" for name, value in scalars.items())
        logging.info("[%d] %s", step, values)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Ignored: a console shows no images."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Ignored."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Ignored."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Ignored."""

    def flush(self) -> None:
        """Nothing to do: nothing is buffered."""

    def close(self) -> None:
        """Nothing to do."""


class Progress:
    """Prints how far a loop is, its rate and the time left, every few seconds and at the end."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None
        self._last_time = 0.0

    def __call__(self, step: int) -> None:
        """To be called after every step or few, with the number of steps done."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._last_time = (step, now), now
        elif now - self._last_time > _EVERY_SECONDS or step == self._num_steps:
            first_step, start = self._first
            rate = (step - first_step) / max(now - start, 1e-9)
            left = (self._num_steps - step) / max(rate, 1e-9)
            self._last_time = now
            logging.info(
                "%d/%d (%.0f%%), %.1f steps/s, ETA %dm%02ds",
                *(step, self._num_steps, 100 * step / self._num_steps, rate),
                *divmod(round(left), 60),
            )
