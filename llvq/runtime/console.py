"""Metrics and progress in the console, for runs with and without TensorBoard.

Both classes have the interface of their counterparts in clu (a MetricWriter, a PeriodicAction),
so that main.py can hand in clu's and a run without TensorFlow can do without them.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    def __init__(self, total: int, description: str, first: int = 0) -> None: ...

    def __enter__(self) -> Any:
        return lambda done, **figures: None

    def __exit__(self, *_: Any) -> None: ...


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join((lines[0], "|---" * len(header) + "|", *lines[1:]))
