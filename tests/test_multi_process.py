"""Several processes, as on the hosts of a pod, against one process that does the same."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llvq import checkpointing
from llvq.data import order
from llvq.runtime import sharding
from tests import groups, run_group, tiny
from tests.run_group import CHECKED_FURTHER, HALFWAY, NUM_STEPS
from tests.runs import create_state

pytestmark = pytest.mark.slow

BY_FOUR = CHECKED_FURTHER
BY_TWO = tuple(name for name in tiny.DISTINCT if name not in BY_FOUR)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(directory of checkpoints by quantizer; what `run` gives of vq_ema's): of one process."""
    directory = tmp_path_factory.mktemp("alone")
    trained = run_group.run("vq_ema", directory / "vq_ema", NUM_STEPS)
    config = run_group.config("dense_lattice")
    with run_group.double_precision():
        state = create_state(config)
        state.params["quantizer"]["basis"] *= 1e-3  # as it becomes in training: many codes
        checkpointing.save_for_inference(directory / "dense_lattice", state, config)
    return directory, trained


def start_both(directory, reference, by_group):
    """Runs a group of 2 and one of 4 at the same time: each goes on with the other's checkpoint.

    Returns {2: [(results, arrays) by process], 4: …}.
    """
    commands = []
    for count, other in ((2, 4), (4, 2)):
        address = groups.free_address()
        paths = [directory / str(count), directory / str(other), reference]
        commands += [
            ("-m", "tests.run_group", address, count, i, *paths, ",".join(by_group[count]))
            for i in range(count)
        ]
    with groups.group(*commands) as processes:
        groups.succeed(processes, timeout=500)
    return {
        count: [
            (
                json.loads((directory / str(count) / f"{i}.json").read_text()),
                dict(np.load(directory / str(count) / f"{i}.npz")),
            )
            for i in range(count)
        ]
        for count in (2, 4)
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory, alone):
    by_group = {2: BY_TWO, 4: BY_FOUR}
    return start_both(tmp_path_factory.mktemp("groups"), alone[0], by_group)


def assert_close(arrays, name, expected, tolerance):
    for key, value in expected.items():
        error = np.linalg.norm(arrays[f"{name}{key}"] - value)
        assert error <= tolerance * np.linalg.norm(value), (name, key)


def check_quantizer(quantizer, results, alone):
    """Each process of a group has the state and figures that one process has."""
    float64 = run_group.steps(quantizer, "float64", 1)
    for _, arrays in results:
        assert_close(arrays, f"{quantizer}/float64", float64, 1e-9)
    if quantizer not in CHECKED_FURTHER:
        return
    float32 = run_group.steps(quantizer, "float32", 1)
    for _, arrays in results:
        # The sums over processes are rounded in another order; each step magnifies that.
        assert_close(arrays, f"{quantizer}/float32", float32, 1e-4)
    directory = alone[0] / quantizer
    expected = run_group.evaluation(quantizer, alone[0] / "results", directory)
    for mine, _ in results:
        evaluation = mine["evaluation"][quantizer]
        assert evaluation.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert evaluation[name] == pytest.approx(value, rel=1e-6), name
            elif name != "checkpoint":  # is relative to the workdir
                assert evaluation[name] == value, name
    if quantizer == "dense_lattice":
        assert expected["effective_codebook_size"] > 100


@pytest.mark.parametrize("quantizer", BY_TWO)
def test_two_processes_train_and_evaluate_as_one(quantizer, both, alone):
    check_quantizer(quantizer, both[2], alone)


@pytest.mark.parametrize("quantizer", BY_FOUR)
def test_four_processes_train_and_evaluate_as_one(quantizer, both, alone):
    check_quantizer(quantizer, both[4], alone)


@pytest.mark.parametrize(("count", "other"), [(2, 4), (4, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(count, other, both, alone):
    """To HALFWAY with `other` processes, from there with `count`: the states and the loss curve."""
    state, losses, _ = alone[1]
    first, _ = both[other][0]
    np.testing.assert_allclose(first["losses"], losses[:HALFWAY], rtol=1e-9)
    for mine, arrays in both[count]:
        np.testing.assert_allclose(mine["resumed_losses"], losses[HALFWAY:], rtol=1e-9)
        assert_close(arrays, "whole", state, 1e-9)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_a_checkpoint_goes_on_with_another_number_of_devices(
    before, after, tmp_path, monkeypatch, alone
):
    directory, (state, losses, _) = alone
    mesh_for_batches = sharding.mesh_for_batches

    def go_on(num_devices, num_steps):
        devices = jax.devices()[:num_devices]
        on_these = functools.partial(mesh_for_batches, devices=devices)
        monkeypatch.setattr(sharding, "mesh_for_batches", on_these)
        return run_group.run("vq_ema", tmp_path, num_steps)

    if before == 8:
        checkpoint = Path("checkpoints", str(HALFWAY))
        shutil.copytree(directory / "vq_ema" / checkpoint, tmp_path / checkpoint)
    else:
        go_on(before, HALFWAY)
    resumed, curve, _ = go_on(after, NUM_STEPS)
    np.testing.assert_allclose(curve, losses[HALFWAY:], rtol=1e-9)
    assert_close(resumed, "", state, 1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_reads_only_its_share(count, both):
    whole = order.training_batches(70, 16, seed=3)
    expected = [next(whole).index.tolist() for _ in range(NUM_STEPS)]
    share = 16 // count
    for i, (mine, _) in enumerate(both[count]):
        positions = slice(i * share, (i + 1) * share)
        assert mine["read"] == [batch[positions] for batch in expected[:HALFWAY]]
        assert mine["resumed_read"] == [batch[positions] for batch in expected[HALFWAY:]]
