"""The console: log lines, progress and metrics.

In a terminal, progress is a bar; elsewhere it is a line every few seconds, without control
characters. Only the first process of a run shows progress.
"""

import logging as python_logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

_EVERY_SECONDS = 10.0
_NUM_FIGURES = 5

# The scalars of an autoencoder that are shown, and their names here.
_SHOWN = {
    "loss": "loss",
    "reconstruction_loss": "reconstruction",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "distinct_codes": "codes",
    "learning_rate": "learning rate",
    "images_per_second": "images/s",
}


def set_up() -> None:
    """Logs short lines that do not break a progress bar; shows only warnings of libraries."""
    handler = _Handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_concerns_user)
    python_logging.getLogger().handlers = [handler]  # instead of absl's and others'
    logging.set_verbosity(logging.INFO)
    sys.excepthook = _show_exception


class _Handler(python_logging.Handler):
    """Writes above the progress bar, if there is one."""

    def emit(self, record: python_logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # the terminal is gone
            self.handleError(record)


def _concerns_user(record: python_logging.LogRecord) -> bool:
    if record.name == "asyncio" or ("/orbax/" in record.pathname and record.exc_info):
        return False  # tracebacks of errors that Orbax also raises; we report them in one line
    if "site-packages" not in record.pathname:
        return True
    is_tensorflow = "/tensorflow" in record.pathname  # its warnings are often about nothing
    return record.levelno >= (python_logging.ERROR if is_tensorflow else python_logging.WARNING)


def _show_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # TensorStore's threads raise this when a read or write fails after Orbax has stopped waiting.
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _is_terminal() -> bool:
    """Checks for a terminal of known width on standard error; tqdm draws nothing on another."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Progress:
    """Shows how far a loop is, its rate and the time left; a context manager.

    The first step compiles, so the rate is measured from its end.
    """

    def __init__(self, total: int, description: str, first: int = 0) -> None:
        """Prepares a loop.

        Args:
          total: the number of steps at the end.
          description: what the loop does, e.g. "training".
          first: the number of steps done before the loop.
        """
        self._total, self._description, self._first = total, description, first
        self._is_shown = jax.process_index() == 0
        self._bar: Any = None
        self._start: tuple[int, float] | None = None  # steps done, and when
        self._last_time = 0.0
        self._waiting = ""  # the line that is not logged yet

    def __enter__(self) -> Callable[..., None]:
        """Returns `report`. Call it after each step, or after every few steps."""
        if self._is_shown and _is_terminal():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._description,
                initial=self._first,
                unit="step",
                dynamic_ncols=True,
                leave=None,  # the bar of a nested loop disappears at its end
            )
        return self.report

    def report(self, done: int, **figures: float | None) -> None:
        """Shows the progress.

        Args:
          done: the number of steps done, including those before the loop.
          figures: what else to show, e.g. loss=0.0312; None shows nothing.
        """
        if not self._is_shown:
            return
        now = time.monotonic()
        is_first = self._start is None
        start, started = self._start = self._start or (done, now)
        shown = [f"{name} {_format(x)}" for name, x in figures.items() if x is not None]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            if is_first:  # tqdm's clock starts here
                self._bar.n = self._bar.initial = self._bar.last_print_n = done
                self._bar.start_t = self._bar.last_print_t = time.time()
                self._bar.refresh()
            else:
                self._bar.update(done - self._bar.n)
            return
        text = f"{self._description}: {done}/{self._total} ({done / self._total:.0%})"
        if done > start:
            rate = (done - start) / max(now - started, 1e-9)
            remaining = _duration((self._total - done) / rate)
            shown = [f"{_format(rate)} steps/s", f"ETA {remaining}", *shown]
        self._waiting = ", ".join([text, *shown])
        if is_first:
            self._last_time = now
        elif now - self._last_time >= _EVERY_SECONDS:
            self._last_time = now
            self._log()

    def _log(self) -> None:
        logging.info("%s", self._waiting)
        self._waiting = ""

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._waiting:
            self._log()


def _duration(seconds: float) -> str:
    """Formats seconds, e.g. as "1m18s" or "2h05m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _format(value: float) -> str:
    """Formats a number with four significant digits, and with all digits of its integer part."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


class ConsoleWriter:
    """A metric writer (see clu) that logs only the most important scalars."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs e.g. "[50] train: loss 0.0312, reconstruction 0.0291, codes 57".

        Args:
          step: the step they belong to.
          scalars: values by name; all names have the same prefix, e.g. "train/".
        """
        prefix, _, _ = next(iter(scalars)).rpartition("/")
        values = {name.removeprefix(f"{prefix}/"): value for name, value in scalars.items()}
        if "reconstruction_loss" in values:
            values = {short: values[name] for name, short in _SHOWN.items() if name in values}
        shown = [f"{name} {_format(x)}" for name, x in list(values.items())[:_NUM_FIGURES]]
        logging.info("[%d] %s", step, ": ".join(filter(None, [prefix, ", ".join(shown)])))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Ignored: a console shows no images."""

    def write_histograms(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Ignored."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Ignored."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Ignored."""

    def close(self) -> None:
        """Does nothing."""


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, aligned: bool = False
) -> str:
    """Formats a table in Markdown, without a final line break.

    Args:
      header: the columns' names.
      rows: each has one cell per column: anything that has a `str`.
      aligned: whether to pad the cells of a column to one width, for a terminal.
    """
    cells = [[*header], *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) if aligned else 0 for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * max(width, 3) for width in widths])
    lines = (" | ".join(map(str.ljust, line, widths)) for line in cells)
    return "\n".join(f"| {line} |" for line in lines)
