"""Several processes in one run: how they find each other, and how they end when one is lost."""

import contextlib
import importlib.util
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax import checkpoint as ocp

from llvq.errors import UserError, first_line
from llvq.runtime import relay

CONNECT_SECONDS = 120  # within which all processes must have started
LOST_SECONDS = 30  # after which a silent process counts as lost

_PATIENCE_SECONDS = 7 * 24 * 3600  # another process may be downloading a data set
_SAY_SECONDS = 10  # the last words may have to wait for a slow terminal

LOST = (
    "another process of this run has ended or cannot be reached (its own last line says why): "
    "start every process again with the same command, and the run resumes from its last checkpoint"
)


def initialize(
    coordinator_address: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run. Call it before anything asks JAX for devices.

    Without arguments, the environment says whether this process is one of several: Slurm, Open
    MPI, Kubernetes (a Job with completionMode Indexed) and Cloud TPU set variables for that. A
    process on its own initialises nothing and waits for nothing.

    From here on, the process ends with one line (LOST) and exit code 1 when another process is
    lost: at once if that is the first process, otherwise within LOST_SECONDS.

    Args:
      coordinator_address: "host:port" of the first process; any free port.
      num_processes: how many processes the run has.
      process_id: which of them this is, from 0.

    Raises:
      UserError: if an argument is missing or impossible, or if the environment says too little.
    """
    global _relay
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
            "go together (give none of them on Cloud TPU and under Slurm, which set them)"
        )
    else:
        assert num_processes is not None
        assert process_id is not None
        _check(coordinator_address, num_processes, process_id)
        where = f"at --coordinator_address={coordinator_address}"
        # If it detected Slurm, JAX would let each process see one device only.
        options = {**given, "cluster_detection_method": "deactivate"}
    logging.info("Waiting up to %d s for all processes, %s", CONNECT_SECONDS, where)
    _relay = _Relay()
    _relay.set_last_words(
        f"the processes, {where}, did not all connect within {CONNECT_SECONDS} s: start each of "
        "them, the first at that address, each with a process id of its own"
    )
    # The service would take SIGTERM for itself: see preemption.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except Exception as error:  # clusters' clients, gRPC and name look-ups raise many kinds
        raise UserError(
            f"the processes of this run, {where}, cannot be joined ({first_line(error)}): give "
            "--coordinator_address, --num_processes and --process_id"
        ) from error
    _relay.set_last_words(LOST)


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
            f"--process_id={process_id}: must be 0 … {num_processes - 1}, a different one for each "
            f"of the --num_processes={num_processes}"
        )


def _cluster() -> str | None:
    """The name of what started this process as one of several, or None."""
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU on Kubernetes"
    # JAX sets this variable if it finds no chips. Google's metadata server knows the rest, and it
    # also describes a single host.
    if importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in variables:
        return "Cloud TPU (on this host alone: set TPU_SKIP_MDS_QUERY=1)"
    if "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables:
        return "Kubernetes"
    return None


class _Relay(threading.Thread):
    """Passes on native error output through another process, and ends this one when a loss is seen.

    JAX's C++ client aborts the process, with a stack trace, when it cannot connect or when another
    process is lost. Python cannot prevent that, but the client first says so on the standard error:
    then the relay prints the last words, and this thread ends the process before JAX does. (If JAX
    is faster, the exit code is SIGABRT's.) All other native output is passed on, also what a crash
    writes last: a thread could not do that, since it dies in the crash. Python's own output does
    not go through the relay.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = subprocess.Popen(
            [sys.executable, "-I", relay.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._are_said = threading.Event()
        self.exit_code = 1
        sys.stderr.flush()
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        assert self._process.stdin
        os.dup2(self._process.stdin.fileno(), 2)
        self._process.stdin.close()
        self.start()

    def set_last_words(self, message: str) -> None:
        """Sets what the relay prints when another process is lost."""
        os.write(2, relay.MARK + f"{_program()}: {message}\n".encode(errors="backslashreplace"))

    def say_last_words(self) -> None:
        """Prints them now, unless they have been printed."""
        os.write(2, relay.MARK + b"\n")
        self._are_said.wait(_SAY_SECONDS)

    def run(self) -> None:
        """Ends the process once the relay has seen that JAX is about to."""
        assert self._process.stdout
        while reason := self._process.stdout.read(1):
            if reason == relay.LOST:
                os._exit(self.exit_code)
            self._are_said.set()


_relay: _Relay | None = None


def _program() -> str:
    return pathlib.Path(sys.argv[0]).name


def leave(message: str, code: int = 1, *, together: bool = False) -> NoReturn:
    """Ends the process, with the message as its last line.

    Args:
      message: what is wrong, or why the run stops.
      code: the exit code, above 0.
      together: whether all processes of the run leave now and may wait for each other. Otherwise
        this one ends at once, so that the others notice as soon as possible.
    """
    if _relay is None:
        sys.exit(_fail(message, code))
    _relay.exit_code = code
    try:
        _relay.set_last_words(message)
        _relay.say_last_words()
    except OSError:  # somebody has ended the relay
        _fail(message, code)
    if together:
        sys.exit(code)
    os._exit(code)


def _fail(message: str, code: int) -> int:
    print(f"{_program()}: {message}", file=sys.stderr, flush=True)
    return code


# The coordination service, Gloo (CPU) and NCCL (GPU) say one of these when a process is gone.
_LOSS = re.compile(
    r"connection (closed|reset|refused)|socket closed|broken pipe|remote process exited"
    r"|ncclRemoteError|heartbeat|(UNAVAILABLE|DEADLINE_EXCEEDED).*(coordination|barrier)",
    re.IGNORECASE | re.DOTALL,
)


def is_loss(error: Exception) -> bool:
    """Whether an error says that the connection to another process of the run is broken."""
    if not jax.distributed.is_initialized():
        return False
    is_communication = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return is_communication and _LOSS.search(str(error)) is not None


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the context in the first process alone, and then in all the others.

    The processes may share a disk or have one each. Either way, what the first one prepares is
    prepared once where it is shared, and by everyone where it is not. Returns when all are done.
    """
    is_first = jax.process_index() == 0
    if not is_first:
        barrier("after the first process")
    yield
    if is_first:
        barrier("after the first process")
    barrier("after all processes")


def barrier(name: str) -> None:
    """Waits until all processes are here, however long that takes; a lost one ends the wait."""
    wait = ocp.multihost.get_barrier_sync_fn()  # does nothing for a process on its own
    wait(key=name, timeout_ms=_PATIENCE_SECONDS * 1000)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in their order. All must call it at the same time.

    Args:
      value: anything that pickle can store, e.g. a pytree of NumPy arrays.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    gathered = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)
    ]
