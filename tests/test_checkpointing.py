"""Checkpoints for inference: all or nothing; and what is no checkpoint."""

import json

import jax
import numpy as np
import pytest

from llvq import checkpointing, train_state
from llvq.errors import UserError
from tests import tiny


def write(directory, config):
    model = train_state.create_model(config["model"], config["quantizer"], "float32", seed=1)
    _, params, statistics = train_state.split(model)
    state = train_state.TrainState(np.int32(5), params, statistics, opt_state=())
    checkpointing.save_for_inference(directory, state, config)
    return state


def test_what_is_loaded_is_what_was_saved(tmp_path):
    config = tiny.config("vq_ema")
    saved = write(tmp_path / "new" / "model", config)
    loaded_config, loaded = checkpointing.load(tmp_path / "new" / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)
    assert loaded_config["quantizer"] == config["quantizer"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_failed_save_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*args):
        assert any(path.is_file() for path in tmp_path.rglob("*"))  # it had begun
        raise error or OSError("no space left on device\nat 0x0")

    monkeypatch.setattr(checkpointing.ocp.JsonCheckpointHandler, "finalize", fail)
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
    with pytest.raises(UserError, match=rf"^checkpoint {tmp_path}/model [^\n]*config\.{field}="):
        checkpointing.load(tmp_path / "model")
