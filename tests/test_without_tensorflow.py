"""llvq on a machine without TensorFlow and what needs it, in a process where they cannot import."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import importlib, pkgutil, sys

from tests.blocked import block

block("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "tensorboard")

import llvq
for module in pkgutil.walk_packages(llvq.__path__, "llvq."):
    importlib.import_module(module.name)

from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate
from tests import tiny

config = tiny.config("sparse_lattice")
state = train_and_evaluate(config, sys.argv[1], tiny.dataset())
results = evaluate(sys.argv[1], tiny.dataset())
assert int(state.step) == results["step"] == 6
print("trained without TensorFlow")
"""


@pytest.mark.slow
def test_every_module_imports_and_training_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "trained without TensorFlow" in result.stdout, result.stderr
