"""Several steps in one call: the same run as one by one, whatever comes in between."""

import contextlib
import types
from unittest import mock

import jax
import numpy as np
import pytest

from llvq import train
from llvq.data import ArrayDataset, order
from llvq.errors import DivergenceError
from llvq.runtime import preemption, sharding
from llvq.training import feeding
from tests import tiny
from tests.runs import Recorder, assert_identical

INTERVALS = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps")

SMALL = {"compute_dtype": "float64", "model.num_residual_blocks": 0}


@pytest.fixture
def _accelerator(monkeypatch):
    """CPUs take as many steps a call as an accelerator does."""
    monkeypatch.setattr(feeding, "_ONE_STEP_PER_CALL", ())


def config(quantizer, num_train_steps, steps_per_call, intervals, **fields):
    return tiny.config(
        quantizer,
        num_train_steps=num_train_steps,
        steps_per_call=steps_per_call,
        **dict(zip(INTERVALS, intervals, strict=True)),
        **SMALL | fields,
    )


def run(workdir, config, data=None):
    """(final state, what was written, the last step of each call), in float64."""
    writer, ends, step = Recorder(), [], train.VQVAETask.step

    def recorded(task, state, call):
        ends.append(call.last_step)
        return step(task, state, call)

    with jax.enable_x64(True), mock.patch.object(train.VQVAETask, "step", recorded):
        state = train.train_and_evaluate(
            config, workdir, data or tiny.dataset(), make_writer=lambda: writer
        )
    return state, writer.scalars, ends


# An epoch of 70 images in batches of 16 is 5 steps; of 4, two of the 8 devices share an image.
@pytest.mark.parametrize(
    ("batch_size", "several", "ends"),
    [
        # After an epoch the steps are others: those without a gradient.
        pytest.param(
            16,
            config("vq_ema", 20, 10, (20, 20, 20), schedule="first_epoch"),
            [5, 10, 15, 20],
            marks=pytest.mark.slow,
        ),
        # As many steps as there are.
        (4, config("sparse_lattice", 9, 6, (6, 6, 12), schedule="cosine"), [3, 6, 9]),
    ],
)
@pytest.mark.usefixtures("_accelerator")
def test_several_steps_in_one_call_are_the_same_run(batch_size, several, ends, tmp_path):
    several["batch_size"] = batch_size
    plain = {**several, "steps_per_call": 1}
    expected_state, expected, calls = run(tmp_path / "plain", plain)
    assert calls == list(range(1, several["num_train_steps"] + 1))
    state, written, calls = run(tmp_path / "several", several)
    assert calls == ends
    for path, value in jax.tree.leaves_with_path(expected_state):
        found = np.asarray(dict(jax.tree.leaves_with_path(state))[path])
        # Float64: the same sums, perhaps in another order, over some steps.
        assert np.linalg.norm(found - value) <= 1e-9 * np.linalg.norm(value), path
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        if "_per_second" not in name:
            assert written[name] == pytest.approx(values, rel=1e-9), name


@pytest.mark.slow
@pytest.mark.usefixtures("_accelerator")
def test_stopped_where_nothing_follows_a_step_it_goes_on_bit_identical(tmp_path, monkeypatch):
    settings = config("vq", 8, 2, (8, 8, 8))
    whole, _, calls = run(tmp_path / "whole", settings)
    assert calls == [2, 4, 6, 8]
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(
            preemption,
            "stop_at_a_step",
            lambda mesh: contextlib.nullcontext(lambda: next(asked)),
        )
        with pytest.raises(preemption.Preempted) as stopped:
            run(tmp_path / "parts", settings)
    assert "saved at step 4" in stopped.value.message
    resumed, _, calls = run(tmp_path / "parts", settings)
    assert calls == [6, 8]
    assert_identical(resumed, whole)
    # From a step that no call of two ends with.
    run(tmp_path / "odd", {**settings, "num_train_steps": 3})
    assert run(tmp_path / "odd", settings)[2] == [4, 5, 6, 7, 8]


@pytest.mark.usefixtures("_accelerator")
def test_a_step_that_diverges_within_a_call_is_named(tmp_path):
    messages = []
    for per_call in (1, 8):
        diverging = config("vq", 48, per_call, (96, 96, 96), learning_rate=1e30)
        with pytest.raises(DivergenceError) as found:
            run(tmp_path / str(per_call), diverging)
        messages.append(str(found.value))
    assert " at step " in messages[0]
    assert " at step 8: " not in messages[0]  # the last of the call
    assert messages[0] == messages[1]


def test_mirrored_images_are_not_resident():
    images = tiny.images(16)
    assert ArrayDataset(train=images).resident("train") is images
    assert ArrayDataset(train=images, flip=True).resident("train") is None


def test_the_last_images_are_those_of_the_last_step():
    images, mesh = tiny.images(70), sharding.make_mesh()
    batches = list(zip(range(6), order.training_batches(70, 16, seed=3), strict=False))
    calls = feeding.several(images, order.training_batches(70, 16, seed=3), 0, 6, mesh, 3)
    for call, steps in zip(calls, ([0, 1, 2], [3, 4, 5]), strict=True):
        last_step, num_steps, (resident, index), last_images = call
        assert (last_step, num_steps) == (steps[-1] + 1, 3)
        np.testing.assert_array_equal(resident, images)
        np.testing.assert_array_equal(index, [batches[step][1].index for step in steps])
        np.testing.assert_array_equal(last_images(), images[batches[steps[-1]][1].index])


@pytest.mark.parametrize(
    ("platform", "steps", "expected"),
    [
        ("cpu", (0, 860), 1),
        ("gpu", (0, 860), 5),
        ("tpu", (215, 4_300, 860), 5),
        ("tpu", (0, 861), 1),
        ("gpu", (217, 860), 1),
    ],
)
def test_calls_have_as_many_steps_as_fit_what_follows_them(platform, steps, expected):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    assert feeding.steps_per_call(5, (*steps, 50, 215, 215), mesh) == expected
    assert feeding.steps_per_call(5, (*steps, 7, 215, 215), mesh) == 1
