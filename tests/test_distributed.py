"""How processes find each other: flags, Slurm's variables, and what cannot be."""

import signal

import jax
import pytest

from llvq.errors import UserError
from llvq.runtime import distributed
from tests import groups, real_data
from tests.groups import finish, group
from tests.test_main import FASHION, SMALL, events

VARIABLES = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    *("OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "KUBERNETES_SERVICE_HOST"),
    "JOB_COMPLETION_INDEX",
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX sets it where there are no chips


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", None, None), "--num_processes is missing"),
        (("localhost:1234", 2, None), "--process_id is missing"),
        (("", 2, 0), "--coordinator_address is missing"),
        (("localhost", 2, 0), "--coordinator_address=localhost: must be host:port"),
        (("localhost:0", 2, 0), "--coordinator_address=localhost:0: must be host:port"),
        ((":1234", 2, 0), "--coordinator_address=:1234: must be host:port"),
        (("localhost:1234", 0, 0), "--num_processes=0: must be 1 or more"),
        (("localhost:1234", 2, 2), "--process_id=2: must be 0 … 1"),
        (("localhost:1234", 2, -1), "--process_id=-1: must be 0 … 1"),
    ],
)
def test_flags_that_cannot_be_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        distributed.initialize(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        ({}, None),  # a laptop, a GPU box
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # in sbatch's script, outside of srun
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),  # one task, all its devices
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU on Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook's pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_what_started_the_process_is_known_by_its_variables(variables, cluster, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: joined.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    distributed.initialize()
    assert len(joined) == (cluster is not None)
    assert distributed._cluster() == cluster
    for options in joined:  # JAX finds the rest
        assert "process_id" not in options


def test_a_tpu_without_its_metadata_is_one_line(monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)

    def initialize(**_):
        raise ConnectionError("metadata.google.internal: no such host\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"Cloud TPU.*TPU_SKIP_MDS_QUERY=1.*no such host") as error:
        distributed.initialize()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_jax_reports_a_first_process_that_is_not_there():
    script = (
        "from llvq.runtime import distributed as d; d.CONNECT_SECONDS = 1; d.initialize('{}', 2, 1)"
    )
    with group(("-c", script.format(groups.free_address()))) as processes:
        ((code, errors),) = finish(processes, timeout=60)
    assert code == -signal.SIGABRT
    assert "DEADLINE_EXCEEDED" in errors


LOSSES = [
    "INTERNAL: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:532] "
    "Connection closed by peer [127.0.0.1]:45678",
    "INTERNAL: Gloo context initialization failed: Connection reset by peer",
    "UNKNOWN: Gloo send failed: [external/gloo/transport/tcp/pair.cc:1] Broken pipe",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network "
    "error. Last NCCL warning(error) log entry (may be unrelated) '...'",
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks "
    "have crashed. [type.googleapis.com/tensorflow.CoordinationServiceError='']",
    "UNAVAILABLE: failed to connect to all addresses\nAdditional GRPC error information from "
    "remote target coordination_service while calling /xla.coordination.Service/Barrier",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: after all processes::0.",
]
OTHERS = [
    "INTERNAL: cuDNN launch failure : input shape ([64,3,148,148])",
    "INTERNAL: NCCL operation ncclCommInitRank(...) failed: unhandled cuda error",
    "INVALID_ARGUMENT: Argument does not match host shape or layout of computation parameter 0",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4398046511104 bytes.",
    "UNAVAILABLE: TPU initialization failed: open(/dev/accel0): Operation not permitted",
    "INTERNAL: the CPU has no such instruction",
]


@pytest.mark.parametrize(
    ("message", "expected"), [(x, True) for x in LOSSES] + [(x, False) for x in OTHERS]
)
def test_only_a_broken_connection_is_a_loss(message, expected, monkeypatch):
    error = jax.errors.JaxRuntimeError(message)
    assert not distributed.is_loss(error)  # a process on its own has nobody to lose
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.is_loss(error) == expected
    assert not distributed.is_loss(ValueError(message.replace("Gloo", "")))


@pytest.mark.slow
@real_data.needs_files
def test_main_under_slurm_on_the_real_data(tmp_path):
    """Two tasks: one run, one TensorBoard file, one voice."""
    command = [
        *("main.py", f"{FASHION}:sparse_lattice", f"--workdir={tmp_path}", *SMALL),
        *("--config.batch_size=500", "--config.num_train_steps=2"),
        "--config.model.num_residual_blocks=0",
    ]
    slurm = {"SLURM_JOB_ID": groups.free_address().rpartition(":")[2], "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost"}
    tasks = [group(command, **slurm, SLURM_PROCID=i, SLURM_LOCALID=i) for i in "01"]
    with tasks[0] as first, tasks[1] as second:
        ended = finish([*first, *second])
    assert [code for code, _ in ended] == [0, 0], ended
    spoken, silent = (errors for _, errors in ended)
    assert "found through Slurm" in spoken
    assert "Starting at step 0 of 2" in spoken
    assert "2 device(s)" in spoken
    assert "ETA" not in silent
    assert "step" not in silent
    assert len(list(tmp_path.glob("events*"))) == 1
    assert events(tmp_path)["validation/psnr"] == 1
    assert (tmp_path / "checkpoints" / "2").is_dir()
