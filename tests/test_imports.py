"""Imports run downwards only: which rooms of llvq may know which others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top. A room may import from those in lines above it, and from itself.
ROOMS = [
    {"errors"},
    {"fields", "data"},
    {"runtime"},
    {"quantizers", "usage"},
    {"models"},
    {"training.plain"},
    {"config"},
    {"training"},
    {"checkpointing"},
    {"pretrained"},
    {"evaluation", "codec"},
    {"train", "evaluate", "encode"},
    {"import_torch", "at_rate"},
    {"export"},
]
# What a config validates against; these take plain arguments, no config.
PLAIN_TRAINING = {"objective", "optimizer", "schedules", "ssim"}
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imported(path):
    """The full names that a file imports, those in functions and for type checkers included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(parts):
    """The room of a module of llvq, by the parts of its path."""
    is_plain = parts[0] == "training" and len(parts) > 1 and parts[1] in PLAIN_TRAINING
    return "training.plain" if is_plain else parts[0]


def rooms_of(names):
    """The rooms of llvq among imported names."""
    return {room_of(name.split(".")[1:]) for name in names if name.startswith("llvq.")}


FILES = sorted((ROOT / "llvq").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    names = imported(path)
    foreign = {"tensorflow", "tensorflow_datasets", "input_pipeline", "configs", "clu"}
    assert not {name.split(".")[0] for name in names} & foreign
    room = room_of(path.relative_to(ROOT / "llvq").with_suffix("").parts)
    if room == "__init__" or path.name == "__main__.py":
        return  # llvq imports everything, when it is first used; a command is on top of all rooms
    for other in rooms_of(names):
        assert other == room or LEVELS[other] < LEVELS[room], f"{room} imports {other}"


def test_every_room_has_its_place():
    rooms = {room_of(path.relative_to(ROOT / "llvq").with_suffix("").parts) for path in FILES}
    assert rooms - {"__init__"} == set(LEVELS)


def test_quantizers_know_no_mesh_and_no_processes():
    for path in (ROOT / "llvq/quantizers").glob("*.py"):
        names = imported(path)
        assert rooms_of(names) <= {"quantizers", "fields", "errors"}
        assert not any(name.startswith("jax.sharding") for name in names)
        assert "process_" not in path.read_text()


def test_the_input_pipeline_knows_data_sets_and_errors_only():
    for path in (ROOT / "input_pipeline").glob("*.py"):
        assert rooms_of(imported(path)) <= {"data", "errors"}, path


def is_tensorflow(name):
    return name.split(".")[0] == "tensorflow"


def test_one_module_imports_tensorflow_and_hides_the_accelerators_from_it():
    files = [ROOT / "main.py", *(ROOT / "input_pipeline").glob("*.py"), *ROOT.glob("results/*.py")]
    importing = {path.name for path in files if any(map(is_tensorflow, imported(path)))}
    assert importing == {"host_tensorflow.py"}


def test_quantizers_and_networks_need_jax_flax_and_jaxtyping_alone():
    """In a new process: nothing else is imported than what these import themselves."""
    program = """
import sys
import jax, flax.nnx, jaxtyping
before = {name.partition(".")[0] for name in sys.modules}
import llvq
assert {name for name in sys.modules if name.startswith("llvq")} == {"llvq"}
from llvq import VQVAE, SparseLattice
quantizer = SparseLattice(8, rngs=flax.nnx.Rngs(0))
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "['llvq']\n", result.stderr


def test_orbax_is_imported_when_a_checkpoint_is_touched():
    program = """
import sys
import llvq, llvq.quantizers, llvq.models, llvq.data
print("orbax.checkpoint" in sys.modules)
import llvq.checkpointing
print("orbax.checkpoint" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]
