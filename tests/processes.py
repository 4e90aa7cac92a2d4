"""Processes of their own for what may hang, crash or be killed.

They are forked from a server that has imported what they need but has neither threads nor devices.
"""

import concurrent.futures
import multiprocessing
import os
import sys
import time
import traceback

import pytest

from llvq.errors import UserError

SECONDS = 300.0  # for what takes some seconds on a quiet machine
SKIPPED, REFUSED = 77, 78  # exit codes

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.test_faults", "tests.fuzz_targets"])


class SkipError(Exception):
    """This machine does not allow it."""


def start(log, function, *arguments, **options):
    """Starts a function that prints to a file; see `end`."""
    process = context.Process(target=_run, args=(log, function, arguments, options), daemon=True)
    process.start()
    return process


def _run(log, function, arguments, options):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["XLA_FLAGS"] = ""  # one device
    code = 0
    try:
        function(*arguments, **options)
    except (UserError, SkipError) as error:
        print(error)
        code = REFUSED if isinstance(error, UserError) else SKIPPED
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(process, log):
    """(exit code, output) of a process, once it has ended; kills one that hangs."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"hangs: {log.read_text()}")
    return process.exitcode, log.read_text()


def run(directory, function, *arguments, **options):
    """Runs a function to its end, which must be a good one."""
    log = directory / f"log_{time.monotonic_ns()}"
    code, output = end(start(log, function, *arguments, **options), log)
    if code == SKIPPED:
        pytest.skip(output.strip())
    assert code == 0, output


class Child:
    """Calls functions of tests/fuzz_targets.py, one at a time, in one process."""

    def __init__(self):
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

    def __call__(self, function, *arguments):
        """(kind, result) of a function; AssertionError if it hangs, crashes or is unclear."""
        try:
            kind, result = self._pool.submit(function, *arguments).result(SECONDS)
        except (TimeoutError, concurrent.futures.process.BrokenProcessPool) as error:
            self.stop()
            self.__init__()
            raise AssertionError(f"the process hangs or crashed: {error!r}") from None
        if kind == "refused":
            assert isinstance(result, str)
            assert result.strip()
            assert result.splitlines() == [result]
            assert "Traceback" not in result
            assert len(result) < 1000
        return kind, result

    def stop(self):
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)
