"""llvq on a machine without TensorFlow and what needs it, in a process where they cannot import."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys

import importlib.machinery, pkgutil

BLOCKED = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "tensorboard")

class PathFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = PathFinder
for name in BLOCKED:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can still be imported")

import llvq
for module in pkgutil.walk_packages(llvq.__path__, "llvq."):
    importlib.import_module(module.name)

from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate
from tests import tiny

config = tiny.config("sparse_lattice")
state = train_and_evaluate(config, sys.argv[1], tiny.dataset())
results = evaluate(config, sys.argv[1], tiny.dataset())
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
