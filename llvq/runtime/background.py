"""A metric writer that works in the background."""

import collections
from collections.abc import Callable
from concurrent import futures
from typing import Any

from llvq.errors import UserError, first_line


class BackgroundWriter:
    """Makes a metric writer (see clu) and calls it from another thread, in order.

    A later call, or `close`, raises the errors of that thread: UserError if metrics cannot be
    written.
    """

    def __init__(self, make_writer: Callable[[], Any]) -> None:
        """Starts the thread.

        Args:
          make_writer: makes the writer. It may take seconds.
        """
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._writer = self._thread.submit(make_writer)
        self._calls: collections.deque[futures.Future[None]] = collections.deque()

    def write_scalars(self, *arguments: Any, **options: Any) -> None:
        self._submit("write_scalars", *arguments, **options)

    def write_images(self, *arguments: Any, **options: Any) -> None:
        self._submit("write_images", *arguments, **options)

    def write_histograms(self, *arguments: Any, **options: Any) -> None:
        self._submit("write_histograms", *arguments, **options)

    def write_texts(self, *arguments: Any, **options: Any) -> None:
        self._submit("write_texts", *arguments, **options)

    def write_hparams(self, *arguments: Any, **options: Any) -> None:
        self._submit("write_hparams", *arguments, **options)

    def close(self) -> None:
        """Waits until everything is written; nothing can be written afterwards."""
        try:
            self._submit("close")
        finally:
            self._thread.shutdown()
        self._raise_errors(wait=True)

    def _submit(self, name: str, *arguments: Any, **options: Any) -> None:
        def call() -> None:
            getattr(self._writer.result(), name)(*arguments, **options)

        self._raise_errors(wait=False)
        self._calls.append(self._thread.submit(call))

    def _raise_errors(self, *, wait: bool) -> None:
        while self._calls and (wait or self._calls[0].done()):
            try:
                self._calls.popleft().result()
            except Exception as error:
                self._calls.clear()
                is_tensorflows = type(error).__module__.startswith("tensorflow")
                if not (is_tensorflows or isinstance(error, OSError)):
                    raise
                raise UserError(
                    f"metrics cannot be written ({_reason(error)}): the same command resumes from "
                    "the last checkpoint"
                ) from error


def _reason(error: Exception) -> str:
    """Shortens an error's message: drops the names of TensorFlow's operations."""
    return first_line(error).rpartition("}} ")[2]
