"""Starts groups of processes on this machine that make one run, as several hosts would."""

import contextlib
import os
import socket
import subprocess
import sys
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A process compiles for longer than it computes.
_FLAGS = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@contextlib.contextmanager
def group(*commands, **variables):
    """Started Python processes of one device, one a command; killed in the end if still running."""
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": _FLAGS, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(processes, timeout=200):
    """[(exit code, standard error)] of each, once it has ended."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def succeed(processes, timeout):
    """Waits for all to end well; kills the others, which may wait for it, once one does not."""
    with futures.ThreadPoolExecutor(len(processes)) as pool:
        ends = {pool.submit(process.communicate, timeout=timeout): process for process in processes}
        for end in futures.as_completed(ends):
            if ends[end].returncode:
                for process in processes:
                    process.kill()
                raise AssertionError(end.result()[1])


def wait_for(process, text):
    """What a process has written to its standard error, up to a line with this text in it."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} is not in {''.join(lines)}")


def last_lines(errors):
    """What main.py says in the end."""
    return [line for line in errors.splitlines() if line.startswith("run_main.py: ")]


def options(count):
    """The flags of each process of a group."""
    address = free_address()
    return [
        (f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={i}")
        for i in range(count)
    ]
