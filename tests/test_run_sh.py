"""run.sh, with a stand-in for Python that records its arguments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llvq.config import RECIPES
from llvq.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("llvq/requirements.txt", "llvq/train-requirements.txt", "requirements.txt")

# Training leaves a checkpoint unless there is one, evaluation a report.
PYTHON = f"""#!/bin/sh
if [ "$1" = -c ]; then
    [ "$REAL_PYTHON" ] && exec "$REAL_PYTHON" "$@"
    echo {" ".join([f"quantizer:{q}" for q in QUANTIZERS] + [f"recipe:{r}" for r in RECIPES])}
    exit
fi
echo "$@" >>calls
for argument; do
    case $argument in
    --workdir=*) workdir=${{argument#*=}} ;;
    --mode=evaluate) evaluate=yes ;;
    esac
done
[ "$workdir" ] || exit 0
if [ "$evaluate" ]; then
    echo '{{}}' >"$workdir/evaluation.json"
else
    mkdir -p "$workdir/checkpoints/860"
fi
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("run.sh", "configs", "input_pipeline", *REQUIREMENTS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "home/tensorflow_datasets/fashion_mnist").mkdir(parents=True)
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").write_text(PYTHON)
    (environment / "bin/python").chmod(0o755)
    installed = [(ROOT / name).read_text() for name in REQUIREMENTS]
    (environment / "requirements.installed").write_text("".join(installed))
    return tmp_path


def run(checkout, *arguments):
    """(process, the arguments that Python was called with)."""
    (checkout / "calls").write_text("")
    environment = {**os.environ, "HOME": str(checkout / "home")}
    environment.pop("TFDS_DATA_DIR", None)
    process = subprocess.run(
        ["./run.sh", *arguments], cwd=checkout, env=environment, capture_output=True, text=True
    )
    return process, (checkout / "calls").read_text().splitlines()


def test_by_default_the_sparse_lattice_is_trained_and_evaluated_once(checkout):
    process, calls = run(checkout)
    assert process.returncode == 0, process.stderr
    workdir = "--workdir=runs/fashion_mnist/paper/sparse_lattice/seed_0"
    train, evaluate, summary = calls
    assert train.split()[1:] == [
        "--config=configs/fashion_mnist.py:sparse_lattice,paper",
        "--config.seed=0",
        workdir,
    ]
    assert evaluate.endswith(f"{workdir} --mode=evaluate")
    assert summary == f"-m results.summary {workdir.partition('=')[2]}"
    _, calls = run(checkout)
    assert calls == [train, summary]  # training finds nothing to do
    newer = checkout / workdir.partition("=")[2] / "checkpoints/1720"
    newer.mkdir()
    os.utime(newer, (2**31, 2**31))
    assert run(checkout)[1] == [train, evaluate, summary]


def test_seeds_and_recipes_end_in_a_table(checkout):
    _, calls = run(checkout, "--seeds=2,32", "--recipe=standard", "celeba", "vq", "dense_lattice")
    *runs, summary, table = calls
    assert table == "-m results.collect runs"
    workdirs = [f"runs/celeba/standard/{name}" for name in ("vq", "dense_lattice")]
    expected = [f"{workdir}/seed_{seed}" for workdir in workdirs for seed in (2, 32)]
    assert summary.split() == ["-m", "results.summary", *expected]
    assert [call.split()[1:4] for call in runs if "evaluate" not in call] == [
        [
            f"--config=configs/celeba.py:{quantizer},standard",
            f"--config.seed={seed}",
            f"--workdir=runs/celeba/standard/{quantizer}/seed_{seed}",
        ]
        for quantizer in ("vq", "dense_lattice")
        for seed in (2, 32)
    ]


def test_quick_runs_are_kept_apart(checkout):
    _, calls = run(checkout, "--quick")
    assert "--config.num_train_steps=200" in calls[0]
    assert "--workdir=runs/quick/fashion_mnist/" in calls[0]


def test_names_come_from_the_registries(checkout, monkeypatch):
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process, calls = run(checkout, "--recipe=standard", *QUANTIZERS)
    assert process.returncode == 0, process.stderr
    trained = [call.split()[1] for call in calls if "--config.seed=0" in call]
    assert trained == [f"--config=configs/fashion_mnist.py:{name},standard" for name in QUANTIZERS]


def test_help_needs_no_virtual_environment(checkout):
    shutil.rmtree(checkout / ".venv")
    process, _ = run(checkout, "--help")
    assert process.returncode == 0
    assert process.stdout.startswith("usage: ./run.sh")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("mnist", "no data set or quantizer is called mnist"),
        ("default", "no data set or quantizer is called default"),
        ("--recipe=short", "no recipe is called short"),
        ("--fast", "usage"),
    ],
)
def test_a_mistake_is_named(checkout, argument, words):
    process, calls = run(checkout, argument)
    assert process.returncode == 2
    assert words in process.stderr
    assert not calls
