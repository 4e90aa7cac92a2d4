"""SIGTERM: the owner of a machine sends it before taking the machine away.

Cloud TPU, Slurm and Kubernetes send it some 30 seconds ahead. Training finishes the present call of
the compiled program (several processes: one of the next two, the same on all), saves and raises
`Preempted`. Everything else raises it at once, since it has nothing to save.
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

EXIT_CODE = os.EX_TEMPFAIL  # 75: the same command, given again, resumes the run


class Preempted(SystemExit):
    """Exits with EXIT_CODE: the program was asked to stop and has saved what it had to save.

    Attributes:
      message: what has been saved and how to resume, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message


def stop_at_once() -> None:
    """Makes SIGTERM raise Preempted wherever the program is; a second SIGTERM does nothing."""

    def stop(signal_number: int, _: Any) -> None:
        signal.signal(signal_number, signal.SIG_IGN)
        raise Preempted("stopped by SIGTERM; the same command resumes from what is saved")

    signal.signal(signal.SIGTERM, stop)


class _Request:
    """Notes SIGTERM; tells whether it has arrived in any process of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.is_noted = False  # by this process
        self._is_agreed = False
        self._mesh = mesh
        self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
        self._pending: jax.Array | None = None  # whether a process had noted it at the last call

    def note(self, *_: Any) -> None:
        """Handles the signal."""
        self.is_noted = True

    def is_time_to_stop(self) -> bool:
        """See `stop_at_a_step`."""
        if jax.process_count() == 1:
            return self.is_noted
        if not self._is_agreed:
            self._is_agreed = self._pending is not None and bool(self._pending)
            notes = np.full(len(self._mesh.local_devices), self.is_noted)
            self._pending = self._any(sharding.to_devices(notes, self._mesh))
        return self._is_agreed


@contextlib.contextmanager
def stop_at_a_step(mesh: Mesh) -> Iterator[Callable[[], bool]]:
    """Only notes SIGTERM in this context, for a loop that asks whether to stop.

    JAX's own `multihost_utils.reached_preemption_sync_point` needs several processes, and it would
    also handle the signal outside of training.

    Args:
      mesh: the devices of all processes that are to stop together.

    Yields:
      A function that says whether to stop now. All processes must call it equally often, e.g.
      after every step, and get the same answers. With several processes, an answer comes one call
      late, so that nothing waits for the devices.
    """
    request = _Request(mesh)
    if threading.current_thread() is not threading.main_thread():
        yield request.is_time_to_stop  # Python allows signal handlers only in the main thread
        return
    previous = signal.signal(signal.SIGTERM, request.note)
    try:
        yield request.is_time_to_stop
    finally:
        # A second signal would change nothing. `previous` is None for a handler outside of Python.
        handler = signal.SIG_IGN if request.is_noted else previous or signal.SIG_DFL
        signal.signal(signal.SIGTERM, handler)
