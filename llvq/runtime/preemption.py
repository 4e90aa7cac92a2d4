"""SIGTERM: what a machine's owner sends before taking it away, and what a run makes of it.

Cloud TPU, Slurm and Kubernetes send it some 30 seconds ahead. Training saves at the next step, on
all processes at the same one, and leaves; everything else stops where it is, since nothing is lost
by that. Either way `Preempted` is raised.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from llvq.runtime import sharding

EXIT_CODE = os.EX_TEMPFAIL  # 75: the same command, given again, goes on


class Preempted(SystemExit):
    """The program was asked to stop, and has saved what it had to; exits with EXIT_CODE.

    Attributes:
      message: what became of it, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message


def stop_at_once() -> None:
    """From here on SIGTERM raises Preempted wherever the program is; a second one does nothing."""

    def stop(signal_number: int, _: Any) -> None:
        signal.signal(signal_number, signal.SIG_IGN)
        raise Preempted("stopped by SIGTERM; the same command goes on from what is saved")

    signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def stop_at_a_step(mesh: Mesh) -> Iterator[Callable[[], bool]]:
    """In this context SIGTERM is only noted, for a loop that asks after each step, or few.

    JAX's own `multihost_utils.reached_preemption_sync_point` is for several processes only, and
    takes the signal for itself while they do something else than training, too.

    Args:
      mesh: the devices of all processes that are to stop together.

    Yields:
      A function that says whether to stop here: the same on all processes, which must call it
      equally often. With several it answers one call late, so as not to wait for the devices.
    """
    is_requested = is_agreed = False
    pending: jax.Array | None = None
    any_of_them = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

    def note(*_: Any) -> None:
        nonlocal is_requested
        is_requested = True

    def is_time_to_stop() -> bool:
        nonlocal is_agreed, pending
        if jax.process_count() == 1:
            return is_requested
        if not is_agreed:
            is_agreed = pending is not None and bool(pending)
            requests = np.full(len(mesh.local_devices), is_requested)
            pending = any_of_them(sharding.to_devices(requests, mesh))
        return is_agreed

    if threading.current_thread() is not threading.main_thread():
        yield is_time_to_stop  # Python lets only the main thread have signal handlers
        return
    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield is_time_to_stop
    finally:
        # Asked twice, it would be no faster. A handler that is not Python's is None.
        handler = signal.SIG_IGN if is_requested else previous or signal.SIG_DFL
        signal.signal(signal.SIGTERM, handler)
