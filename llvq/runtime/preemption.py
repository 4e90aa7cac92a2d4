"""SIGTERM: the owner of a machine sends it before taking the machine away.

Cloud TPU, Slurm and Kubernetes send it some 30 seconds ahead. Training finishes the present call of
the compiled program (several processes: one of the next two, the same on all), saves and leaves.
Everything else stops where it is, since nothing is lost by that. Either way `Preempted` is raised.
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
    """The program was asked to stop, and has saved what it had to; exits with EXIT_CODE.

    Attributes:
      message: what has been saved and how to resume, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message


def stop_at_once() -> None:
    """From here on SIGTERM raises Preempted wherever the program is; a second one does nothing."""

    def stop(signal_number: int, _: Any) -> None:
        signal.signal(signal_number, signal.SIG_IGN)
        raise Preempted("stopped by SIGTERM; the same command resumes from what is saved")

    signal.signal(signal.SIGTERM, stop)


class _Request:
    """Whether SIGTERM has arrived, in any of the processes of a mesh."""

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
    """In this context SIGTERM is only noted, for a loop that asks whether to stop.

    JAX's own `multihost_utils.reached_preemption_sync_point` works with several processes only,
    and it would handle the signal outside of training, too.

    Args:
      mesh: the devices of all processes that are to stop together.

    Yields:
      A function that says whether to stop now. All processes must call it equally often, e.g.
      after every step, and get the same answers. With several processes, an answer is one call
      late, so that nothing waits for the devices.
    """
    request = _Request(mesh)
    if threading.current_thread() is not threading.main_thread():
        yield request.is_time_to_stop  # Python lets only the main thread have signal handlers
        return
    previous = signal.signal(signal.SIGTERM, request.note)
    try:
        yield request.is_time_to_stop
    finally:
        # A second signal would make nothing faster. A handler that is not Python's is None.
        handler = signal.SIG_IGN if request.is_noted else previous or signal.SIG_DFL
        signal.signal(signal.SIGTERM, handler)
