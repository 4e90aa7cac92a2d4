"""Several processes in one run: how they find each other, and how they end when one is lost."""

import contextlib
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from absl import logging
from orbax import checkpoint as ocp

from llvq.errors import UserError, first_line

CONNECT_SECONDS = 120  # for all processes to have started
LOST_SECONDS = 30  # after which a process that is not heard of counts as lost

_PREPARE_SECONDS = 7 * 24 * 3600  # the first process may be downloading a data set

LOST = (
    "another process of this run has ended or cannot be reached (its own last line says why): "
    "give every process the same command again, the run goes on from its last checkpoint"
)


def initialize(
    coordinator_address: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; to be called before anything asks JAX for devices.

    Without arguments, what started the process says whether it is one of several: Slurm, Open MPI,
    Kubernetes (a Job with completionMode Indexed) or Cloud TPU. A process on its own stays so: it
    initialises nothing and waits for nothing.

    From here on, a process whose fellows are lost ends by itself: it prints one line and exits
    with 1, at once if the first process is lost, else within LOST_SECONDS.

    Args:
      coordinator_address: "host:port" of the first process; the port is any free one.
      num_processes: in the run.
      process_id: which of them this is, from 0.

    Raises:
      UserError: if some of the arguments are missing or cannot be, or if what started the process
        says too little.
    """
    given = {
        "coordinator_address": coordinator_address or None,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    options: dict[str, Any] = {}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        cluster = _cluster()
        if cluster is None:
            return
        where = f"found through {cluster}"
    elif missing:
        raise UserError(
            f"--{missing[0]} is missing: --coordinator_address, --num_processes and --process_id "
            "go together (none of them on Cloud TPU and under Slurm, which tell by themselves)"
        )
    else:
        assert num_processes is not None
        assert process_id is not None
        _check(coordinator_address, num_processes, process_id)
        where = f"at --coordinator_address={coordinator_address}"
        # Slurm would have each process see one device, by its number on the host.
        options = {**given, "cluster_detection_method": "deactivate"}
    logging.info("Waiting up to %d s for all processes, %s", CONNECT_SECONDS, where)
    watch = _FatalErrors(
        f"the processes, {where}, did not all connect within {CONNECT_SECONDS} s: start each of "
        "them, the first at that address, each with another process id"
    )
    # It would take SIGTERM for itself: see preemption.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except Exception as error:  # whatever a cluster's client, gRPC or a look-up of names raises
        raise UserError(
            f"the processes of this run, {where}, cannot be joined ({first_line(error)}): give "
            "--coordinator_address, --num_processes and --process_id"
        ) from error
    watch.message = LOST


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address={coordinator_address}: must be host:port of the first process"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: must be 0 … {num_processes - 1}, another one for each of "
            f"the --num_processes={num_processes}"
        )


def _cluster() -> str | None:
    """What started this process as one of several, by the variables that it sets for that."""
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU on Kubernetes"
    # JAX has set this variable when it found no chips; Google's metadata server knows the rest,
    # also of a single host.
    if importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in variables:
        return "Cloud TPU (on this host alone: set TPU_SKIP_MDS_QUERY=1)"
    if "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables:
        return "Kubernetes"
    return None


class _FatalErrors(threading.Thread):
    """Ends the process in one line where JAX would abort it with a stack trace.

    JAX's C++ client aborts when it cannot connect, when another process is lost and when the first
    one is gone, and leaves Python no say in it. But before it does, it writes to the standard
    error: that goes through a pipe from here on, Python's own output does not.

    Attributes:
      message: the line.
    """

    _SIGN = b"because the JAX distributed service detected fatal errors"

    def __init__(self, message: str) -> None:
        super().__init__(daemon=True)
        self.message = message
        sys.stderr.flush()
        self._stderr = os.dup(2)
        self._read, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        handler = logging.get_absl_handler().python_handler
        is_console = handler.stream is sys.stderr
        sys.stderr = os.fdopen(self._stderr, "w", buffering=1, errors="backslashreplace")
        if is_console:
            handler.setStream(sys.stderr)
        self.start()

    def run(self) -> None:
        before = b""
        while written := os.read(self._read, 1 << 16):
            # It may come in two parts.
            before = before[-len(self._SIGN) :] + written
            if self._SIGN in before:
                _say(self.message, 1)
                os._exit(_exit_code)
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(self._stderr, written)


_saying = threading.Lock()
_exit_code = 0


def _say(message: str, code: int) -> None:
    """Prints the last line of this process, the first time that it is called."""
    global _exit_code
    with _saying:
        if not _exit_code:
            _exit_code = code
            print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def leave(message: str, code: int = 1, *, together: bool = False) -> NoReturn:
    """Ends the process, with one line: the message.

    Args:
      message: what is wrong, or why the run stops.
      code: the exit code, above 0.
      together: whether all processes of the run leave now and may wait for each other. Else the
        others are to notice as soon as possible.
    """
    _say(message, code)
    if jax.distributed.is_initialized() and not together:
        os._exit(_exit_code)
    sys.exit(_exit_code)


def is_loss(error: Exception) -> bool:
    """Whether an error tells, as far as can be told, that another process is lost."""
    if not jax.distributed.is_initialized():
        return False
    is_communication = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return is_communication and "RESOURCE_EXHAUSTED" not in str(error)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What is done in the context, the first process does alone and all the others after it.

    They may share a disk, or have one each: either way what the first one prepares is prepared once
    where it is shared, and by everyone where it is not. Returns when all are through.
    """
    wait = ocp.multihost.get_barrier_sync_fn()  # does nothing for a process on its own
    milliseconds = _PREPARE_SECONDS * 1000
    is_first = jax.process_index() == 0
    if not is_first:
        wait(key="after the first process", timeout_ms=milliseconds)
    yield
    if is_first:
        wait(key="after the first process", timeout_ms=milliseconds)
    wait(key="after all processes", timeout_ms=milliseconds)
