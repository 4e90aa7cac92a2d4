"""Several steps in one call: the same run as one by one, whatever comes in between."""

import types

import jax
import numpy as np
import pytest

from llvq import configuration, feeding, order, sharding, train
from llvq.data import ArrayDataset
from llvq.errors import DivergenceError
from tests import tiny
from tests.test_train import Recorder, assert_identical

SMALL = {"compute_dtype": "float64", "model.num_residual_blocks": 0}


def several(monkeypatch, per_call):
    """From here on as on an accelerator, with so many steps a call."""
    monkeypatch.setattr(feeding, "steps_per_call", lambda *_: per_call)


def run(workdir, config, data=None):
    """(final state, what was written, the last step of each call), in float64."""
    writer, ends = Recorder(), []

    def progress(num_steps):
        return ends.append if num_steps == config["num_train_steps"] else lambda step: None

    with jax.enable_x64(True):
        state = train.train_and_evaluate(
            *(config, workdir, data or tiny.dataset()),
            make_writer=lambda: writer,
            progress=progress,
        )
    return state, writer.scalars, ends


# An epoch of 70 images in batches of 16 is 5 steps; of 4, two devices share an image.
@pytest.mark.parametrize(
    ("quantizer", "batch_size", "schedule", "ends"),
    [
        # Other steps follow the fifth: those without a gradient.
        ("vq_ema", 16, "first_epoch", [3, 4, 5, 8, 9, 10, 11]),
        ("sparse_lattice", 4, "cosine", [3, 4, 7, 8, 9, 10, 11]),
    ],
)
def test_several_steps_in_one_call_are_the_same_run(
    quantizer, batch_size, schedule, ends, tmp_path, monkeypatch
):
    config = tiny.config(
        quantizer,
        **SMALL,
        batch_size=batch_size,
        schedule=schedule,
        num_train_steps=11,
        log_every_steps=4,
        eval_every_steps=10,
        checkpoint_every_steps=9,
    )
    expected_state, expected, one_by_one = run(tmp_path / "plain", config)
    assert one_by_one == list(range(1, 12))
    several(monkeypatch, 3)
    state, written, calls = run(tmp_path / "several", config)
    assert calls == ends
    for path, value in jax.tree.leaves_with_path(expected_state):
        found = np.asarray(dict(jax.tree.leaves_with_path(state))[path])
        # Float64: the same sums, perhaps in another order, over 11 steps.
        assert np.linalg.norm(found - value) <= 1e-9 * np.linalg.norm(value), path
    assert written.keys() == expected.keys()
    for name in expected.keys() - {"start/compile_seconds", "start/seconds_to_first_step"}:
        if "_per_second" not in name:
            assert written[name] == pytest.approx(expected[name], rel=1e-9), name


def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    several(monkeypatch, 3)
    config = tiny.config("vq", **SMALL, num_train_steps=8, eval_every_steps=4)
    config |= {"log_every_steps": 4, "checkpoint_every_steps": 4}
    whole, _, calls = run(tmp_path / "whole", config)
    assert calls == [3, 4, 7, 8]
    run(tmp_path / "parts", {**config, "num_train_steps": 4})
    resumed, _, calls = run(tmp_path / "parts", config)
    assert calls == [7, 8]
    assert_identical(resumed, whole)


def test_a_step_that_diverges_within_a_call_is_named(tmp_path, monkeypatch):
    config = tiny.config("vq", learning_rate=1e30, num_train_steps=50)
    config |= dict.fromkeys(configuration.INTERVALS, 100)
    with pytest.raises(DivergenceError) as plain:
        train.train_and_evaluate(config, tmp_path / "plain", tiny.dataset())
    several(monkeypatch, 8)
    with pytest.raises(DivergenceError) as found:
        train.train_and_evaluate(config, tmp_path / "several", tiny.dataset())
    assert " at step 2: " in str(plain.value)
    assert str(found.value) == str(plain.value)


def test_mirrored_images_are_fed_one_by_one(tmp_path, monkeypatch):
    several(monkeypatch, 3)
    data = ArrayDataset(train=tiny.images(70), validation=tiny.images(16, 1), flip=True)
    config = tiny.config("vq", **SMALL, num_train_steps=3, log_every_steps=3)
    assert run(tmp_path, config, data)[2] == [1, 2, 3]


def test_the_last_images_are_those_of_the_last_step():
    images, mesh = tiny.images(70), sharding.make_mesh()
    batches = list(zip(range(6), order.training_batches(70, 16, seed=3), strict=False))
    calls = feeding.several(
        images,
        order.training_batches(70, 16, seed=3),
        *(0, 6, mesh),
        per_call=4,
        is_event=lambda step: step == 6,
    )
    for (last_step, (resident, index), last_images), steps in zip(
        calls, ([0, 1, 2, 3], [4], [5]), strict=True
    ):
        assert last_step == steps[-1] + 1
        np.testing.assert_array_equal(resident, images)
        np.testing.assert_array_equal(index, [batches[step][1].index for step in steps])
        np.testing.assert_array_equal(last_images(), images[batches[steps[-1]][1].index])


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 1), ("gpu", 5), ("tpu", 5)])
def test_only_accelerators_take_several_steps(platform, expected):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert feeding.steps_per_call({"steps_per_call": 5}, mesh) == expected
