"""A run whose checkpoints are damaged resumes from, and is evaluated at, its newest sound one."""

import os
import random
import shutil

import pytest

from llvq import checkpointing, train
from tests import fuzzing, tiny
from tests.image_data import flip, refused
from tests.runs import abstract_state, leaves
from tests.test_faults import config, steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps, to be copied, and the states of its checkpoints 7 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    # Kept: 4, the best but for 8, and 6, 7, 8.
    newest = train.train_and_evaluate(config(8, keep_checkpoints=3), workdir, tiny.dataset())
    assert steps(workdir) == [4, 6, 7, 8]
    other = shutil.copytree(workdir, workdir.parent / "other")
    shutil.rmtree(other / "checkpoints/8")
    seven = checkpointing.resume(other, abstract_state)
    return workdir, {"7": leaves(seven), "8": leaves(newest)}


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def identical(a, b):
    return a.keys() == b.keys() and all(
        (x.dtype, x.shape, x.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())
        for name, x in a.items()
    )


def is_noticed(workdir, states, caplog):
    """Whether 7 is the one to go on from, because 8 is damaged; otherwise 8 must be intact."""
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        checkpoint, _, loaded = checkpointing.load(workdir)
        assert steps(workdir) == [4, 6, 7, 8]  # who evaluates changes nothing
        restored = leaves(checkpointing.resume(workdir, abstract_state))
    warnings = [record.getMessage() for record in caplog.records if record.name == "absl"]
    params = {".params" + name: array for name, array in leaves(loaded.params).items()}
    expected = {n: x for n, x in states[checkpoint.name].items() if n.startswith(".params")}
    assert identical(params, expected)
    if identical(restored, states["8"]):
        assert (checkpoint.name, steps(workdir), warnings) == ("8", [4, 6, 7, 8], [])
        return False
    assert identical(restored, states["7"]), "damage goes unnoticed"
    assert steps(workdir) == [4, 6, 7]
    assert all("checkpoints/8 " in line and "checkpoints/7" in line for line in warnings)
    # The arrays of the optimizer are read in training only.
    assert len(warnings) == (1 if checkpoint.name == "8" else 2)
    (workdir / "checkpoints/8.damaged").rename(workdir / "checkpoints/8")
    if checkpoint.name == "7":
        with refused(f"{workdir}/checkpoints/8"):
            checkpointing.load(workdir / "checkpoints/8")
    return True


MARKS = dict.fromkeys(("flip", "truncate", "remove", "change_json"), pytest.mark.slow)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.long)) for kind in fuzzing.KINDS],
)
def test_damage_to_any_file_is_noticed_or_means_nothing(kind, run, copy, caplog):
    whole, states = run
    names = [path.relative_to(whole) for path in files(whole / "checkpoints/8")]
    found = []
    for name in names:
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        others = [copy / other for other in names]
        fuzzing.damage(copy / name, others, kind, random.Random(str(name)))
        if is_noticed(copy, states, caplog):
            found.append(name)
    assert len(found) >= 3  # other files are never read


def test_a_flipped_bit_of_the_arrays_is_noticed(run, copy, caplog):
    """Which TensorStore itself does not check."""
    whole, states = run
    name = max(files(whole / "checkpoints/8/state"), key=lambda path: path.stat().st_size)
    content, reasons = name.read_bytes(), []
    for place in range(len(content) // 16, len(content), len(content) // 8):
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        (copy / name.relative_to(whole)).write_bytes(flip(content, place))
        if is_noticed(copy, states, caplog):
            reasons.append(caplog.text)
    assert any("is not what was saved" in reason for reason in reasons)


@pytest.mark.parametrize("item", ["state", "config"])
def test_a_checkpoint_without_an_item_is_passed_over(item, run, copy, caplog):
    shutil.rmtree(copy / "checkpoints/8" / item)
    assert is_noticed(copy, run[1], caplog)


@pytest.mark.slow
def test_a_run_goes_on_before_a_damaged_checkpoint_and_saves_it_again(copy, tmp_path):
    """Twice: its steps 8 and 9 are the same as without damage."""
    expected = train.train_and_evaluate(config(9), tmp_path / "nine", tiny.dataset())
    os.truncate(copy / "checkpoints/4/metrics/metrics", 20)  # by which the manager ranks
    for aside in ("8.damaged", "8.damaged2"):
        os.truncate(copy / "checkpoints/8/config/metadata", 20)
        shutil.rmtree(copy / "checkpoints/9", ignore_errors=True)
        state = train.train_and_evaluate(config(9, keep_checkpoints=3), copy, tiny.dataset())
        assert identical(leaves(state), leaves(expected))
        assert (copy / "checkpoints" / aside).is_dir()
    assert steps(copy)[-2:] == [8, 9]
    assert (copy / "checkpoints/4.damaged").is_dir()


def test_where_every_checkpoint_is_damaged_nothing_is_touched(copy):
    for step in steps(copy):
        (copy / f"checkpoints/{step}/state/manifest.ocdbt").unlink()
    before = fuzzing.contents(copy)
    with refused("checkpoints/8 cannot be read.*nor can the 3 before it"):
        train.train_and_evaluate(config(9), copy, tiny.dataset())
    with refused("checkpoints/8 cannot be read.*nor can the 3 before it"):
        checkpointing.load(copy)
    assert fuzzing.contents(copy) == before
