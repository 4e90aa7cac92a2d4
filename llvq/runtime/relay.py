"""Passes on what the native code of a process writes to its standard error; see `distributed`.

This file runs as a process of its own, because only another process can pass on what a crashing
one has written. It imports nothing of llvq, so that it starts at once.

The standard input carries the native output. A line of `distributed` starts with MARK: the last
words to print when another process is lost, or nothing, which prints them now. Nothing follows the
last words. A letter on the standard output says that they are printed.
"""

import contextlib
import os
import signal
import sys

MARK = b"\0"
LOST = b"l"  # JAX is about to abort
SAID = b"s"  # `distributed` asked for the last words

_JAX_ABORTS = b"because the JAX distributed service detected fatal errors"


def main() -> None:
    """Passes lines on until every process that could write to the standard input has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the process may handle them, and write more
    last_words, is_over = b"", False
    for line in sys.stdin.buffer:
        text, mark, words = line.partition(MARK)
        is_loss = _JAX_ABORTS in text
        if not is_over and not is_loss:
            _write(2, text)
        if words.strip():
            last_words = words
        elif mark or is_loss:
            if not is_over:
                _write(2, last_words)
            is_over = True
            _write(1, LOST if is_loss else SAID)


def _write(descriptor: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal or the process is gone
        os.write(descriptor, text)


if __name__ == "__main__":
    main()
