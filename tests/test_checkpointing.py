"""Checkpoints for inference: all or nothing; and what is no checkpoint."""

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax import checkpoint as ocp

from llvq import checkpointing, evaluate, train
from llvq.checkpointing import integrity, manager
from llvq.config import to_dict
from llvq.errors import UserError
from llvq.models import factory
from llvq.training import train_state
from llvq.training.train_state import parts
from tests import tiny
from tests.runs import abstract_state, assert_identical, create_model, create_state


def write(directory, config):
    _, params, statistics = factory.split(create_model(config))
    state = train_state.TrainState(np.int32(5), params, statistics, opt_state=())
    checkpointing.save_for_inference(directory, state, config)
    return state


def test_what_is_loaded_is_what_was_saved(tmp_path):
    config = tiny.config("vq_ema")
    saved = write(tmp_path / "new" / "model", config)
    _, loaded_config, loaded = checkpointing.load(tmp_path / "new" / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)
    assert to_dict(loaded_config) == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_failed_save_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*args):
        assert any(path.is_file() for path in tmp_path.rglob("*"))  # it had begun
        raise error or OSError("no space left on device\nat 0x0")

    monkeypatch.setattr(manager.ocp.JsonCheckpointHandler, "finalize", fail)
    message = None if error else r"^/.*/model cannot be written \(no space left on device\)$"
    with pytest.raises(error or UserError, match=message):
        write(tmp_path / "model", tiny.config("vq"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already: name a new directory, or delete it$"):
        write(tmp_path, tiny.config("vq"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model.ckpt").write_text("PyTorch's")
    with pytest.raises(UserError, match=r"/model.ckpt is a file, .* llvq.import_torch [^\n]*$"):
        checkpointing.find(tmp_path / "model.ckpt")
    write(tmp_path / "whole", tiny.config("vq"))
    (tmp_path / "whole/state").rename(tmp_path / "whole/state.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match=r"^no checkpoint in /.*/whole: "):
        checkpointing.find(tmp_path / "whole")
    # What a killed save leaves beside the last whole checkpoint.
    write(tmp_path / "run/checkpoints/4", tiny.config("vq"))
    (tmp_path / "whole").rename(tmp_path / "run/checkpoints/6.orbax-checkpoint-tmp")
    assert checkpointing.find(tmp_path / "run").name == "4"


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.num_residual_blocks", 10**12), ("model.hidden_dims", "8"), ("batch_size", 0)],
)
def test_a_config_with_impossible_sizes_is_one_line_at_once(field, value, tmp_path):
    write(tmp_path / "model", tiny.config("vq"))
    path = tmp_path / "model/config/metadata"
    *section, name = field.split(".")
    config = json.loads(path.read_text())
    (config[section[0]] if section else config)[name] = value
    path.write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "model/digests")  # as of an old checkpoint: nothing else would notice
    with pytest.raises(UserError, match=rf"^checkpoint {tmp_path}/model [^\n]*config\.{field}="):
        checkpointing.load(tmp_path / "model")


@pytest.fixture
def as_second_process(monkeypatch):
    """This process passes for the second of two, which process 0 tells a number."""

    def pretend(told=0):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda _: None)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: np.int32(told))

    return pretend


@pytest.mark.slow
def test_every_process_takes_the_checkpoint_of_the_first(tmp_path, as_second_process):
    """Which may have looked before, or after, the newest one was there."""
    train.train_and_evaluate(tiny.config("vq"), tmp_path, tiny.dataset())
    as_second_process(4)  # of 6 steps
    path, _, state = checkpointing.load(tmp_path)
    assert (path.name, int(state.step)) == ("4", 4)
    resumed = checkpointing.resume(tmp_path, abstract_state)
    assert int(resumed.step) == 4


def test_a_workdir_that_is_not_shared(tmp_path, as_second_process):
    as_second_process()
    with pytest.raises(UserError, match=r"--workdir=.* is not the same directory for all"):
        checkpointing.require_writable(tmp_path)
    (tmp_path / ".shared").write_text("")  # as process 0 does
    checkpointing.require_writable(tmp_path)


def test_several_processes_do_not_go_on_without_a_checkpoint(tmp_path, monkeypatch):
    """The others would wait for the one whose save failed."""
    config = tiny.config("vq", stop_on_failed_save=False)
    monkeypatch.setattr(manager, "require_room", mock.Mock(side_effect=OSError("full")))
    checkpoints = mock.Mock(directory=tmp_path)
    checkpoints.latest_step.return_value = None
    state = create_state(config)
    checkpointing.save(checkpoints, 3, state, config, None, stop_on_failure=False)  # only warns
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="step 3 could not be saved"):
        checkpointing.save(checkpoints, 3, state, config, None, stop_on_failure=False)


def test_a_file_in_place_of_the_checkpoints(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoint"):
        train.train_and_evaluate(tiny.config("vq"), tmp_path, tiny.dataset())
    with pytest.raises(UserError, match="checkpoint"):
        evaluate.evaluate(tmp_path, tiny.dataset())


def as_of_version(version, checkpoint):
    """Rewrites a checkpoint as version 0.1 or 0.2 wrote it; 0.2 only kept Adam's moments."""
    state = checkpointing.resume(checkpoint.parent.parent, abstract_state)
    config = json.loads((checkpoint / "config/metadata").read_text())
    if version == "0.2":
        state = state.replace(opt_state=state.opt_state[0])
    old = parts(jax.tree.map(np.asarray, state))
    metrics = json.loads((checkpoint / "metrics/metrics").read_text())
    shutil.rmtree(checkpoint / "state")
    with ocp.StandardCheckpointer() as writer:
        writer.save(checkpoint / "state", old)
    digests = integrity.digests(old, config, metrics)
    if version == "0.2":
        digests["format"] = 2
    (checkpoint / "digests/metadata").write_text(json.dumps(digests))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.1", "0.2"])
@pytest.mark.parametrize("quantizer", ["vq_ema", "sparse_lattice"])
def test_an_older_run_resumes_bit_identical(quantizer, version, tmp_path):
    data = tiny.dataset()
    whole = train.train_and_evaluate(tiny.config(quantizer), tmp_path / "whole", data)
    train.train_and_evaluate(tiny.config(quantizer, num_train_steps=4), tmp_path / "old", data)
    as_of_version(version, tmp_path / "old/checkpoints/4")
    evaluated = evaluate.evaluate(tmp_path / "old", data)
    assert evaluated["step"] == 4
    resumed = train.train_and_evaluate(tiny.config(quantizer), tmp_path / "old", data)
    assert_identical(resumed, whole)


def test_a_resume_reads_the_state_once(tmp_path, monkeypatch):
    reads = []
    restore = ocp.PyTreeCheckpointHandler.restore

    def counted(handler, directory, *arguments, **options):
        reads.append(directory)
        return restore(handler, directory, *arguments, **options)

    train.train_and_evaluate(tiny.config("vq", num_train_steps=4), tmp_path, tiny.dataset())
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", counted)
    train.train_and_evaluate(tiny.config("vq"), tmp_path, tiny.dataset())
    assert [path.parent.name for path in reads] == ["4"]
    reads.clear()
    evaluate.evaluate(tmp_path, tiny.dataset())
    assert [path.parent.name for path in reads] == ["6"]
