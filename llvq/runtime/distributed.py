"""Several processes in one run: they find each other, and all end when one is lost."""

import contextlib
import importlib.util
import os
import pathlib
import pickle
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax import checkpoint as ocp

from llvq.errors import UserError, first_line

CONNECT_SECONDS = 120  # within which all processes must have started
LOST_SECONDS = 30  # after which a silent process counts as lost

_PATIENCE_SECONDS = 7 * 24 * 3600  # another process may be downloading a data set

LOST = (
    "another process of this run has ended or cannot be reached (its own output says why): "
    "start every process again with the same command, and the run resumes from its last checkpoint"
)


def initialize(
    coordinator_address: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run. Call it before anything asks JAX for devices.

    Without arguments, the environment says whether this process is one of several: Slurm, Open
    MPI, Kubernetes (a Job with completionMode Indexed) and Cloud TPU set variables for that. A
    process on its own initialises nothing and waits for nothing.

    If the processes do not all connect within CONNECT_SECONDS, or if one of them is lost later,
    JAX aborts the others with a report: at once where it sees the connection break, otherwise
    after LOST_SECONDS.

    Args:
      coordinator_address: "host:port" of the first process; any free port.
      num_processes: how many processes the run has.
      process_id: which of them this is, from 0.

    Raises:
      UserError: if an argument is missing or impossible, or if the environment says too little.
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
    """Names what started this process as one of several, or returns None."""
    variables = os.environ
    if "SLURM_STEP_NODELIST" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU on Kubernetes"
    # JAX sets this variable if it finds no chips. Otherwise JAX asks Google's metadata server for
    # the processes, also on a single host.
    if importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in variables:
        return "Cloud TPU (on this host alone: set TPU_SKIP_MDS_QUERY=1)"
    if "KUBERNETES_SERVICE_HOST" in variables and "JOB_COMPLETION_INDEX" in variables:
        return "Kubernetes"
    return None


def leave(message: str, code: int = 1, *, together: bool = False) -> NoReturn:
    """Prints a message and ends the process.

    Args:
      message: what is wrong, or why the run stops.
      code: the exit code, above 0.
      together: whether to wait for the other processes, up to LOST_SECONDS, because they probably
        leave as well. Otherwise this one ends at once, so that the others notice it soon.
    """
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    if not jax.distributed.is_initialized() or (together and _all_leave()):
        sys.exit(code)
    os._exit(code)


def _all_leave() -> bool:
    """Waits for the other processes. Without them, JAX would abort in an ordinary exit."""
    try:
        barrier("all leave", LOST_SECONDS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


# The coordination service, Gloo (CPU) and NCCL (GPU) report a lost process with one of these.
_LOSS = re.compile(
    r"connection (closed|reset|refused)|socket closed|broken pipe|remote process exited"
    r"|ncclRemoteError|heartbeat|(UNAVAILABLE|DEADLINE_EXCEEDED).*(coordination|barrier)",
    re.IGNORECASE | re.DOTALL,
)


def is_loss(error: Exception) -> bool:
    """Says whether an error means that the connection to another process of the run is broken."""
    if not jax.distributed.is_initialized():
        return False
    is_communication = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return is_communication and _LOSS.search(str(error)) is not None


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the context in the first process alone, and then in all the others.

    On a disk that they share, the others find what the first one has prepared; each process with a
    disk of its own prepares everything itself. Returns when all are done.
    """
    is_first = jax.process_index() == 0
    if not is_first:
        barrier("after the first process")
    yield
    if is_first:
        barrier("after the first process")
    barrier("after all processes")


def barrier(name: str, seconds: int = _PATIENCE_SECONDS) -> None:
    """Waits until all processes are here. By default, only a lost process ends the wait early."""
    wait = ocp.multihost.get_barrier_sync_fn()  # does nothing for a process on its own
    wait(key=name, timeout_ms=seconds * 1000)


def all_gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order. All must call it at the same time.

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
