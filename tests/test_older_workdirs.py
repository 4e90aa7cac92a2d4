"""Workdirs that an older version wrote: see tests/workdirs/README.md."""

import functools
import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from llvq import checkpointing, export, load_pretrained, pretrained
from llvq.config import to_dict
from llvq.data import ArrayDataset
from llvq.evaluate import evaluate
from llvq.quantizers import QUANTIZERS
from llvq.train import train_and_evaluate

ARCHIVE = Path(__file__).parent / "workdirs/of_version_0.2.0.tar.xz"
# Float32 on another machine: sums in another order, through two steps of Adam.
TOLERANCE = 1e-3

# The others take minutes.
FAST = ("sparse_lattice",)
ALL = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in (*QUANTIZERS, "pod")
]
NAMES = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("of_version_0.2.0")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@functools.cache
def read(path):
    return json.loads(path.read_text())


def data(workdirs):
    images = np.load(workdirs / "images.npz")["images"]
    return ArrayDataset(train=images[:24], validation=images[24:32], test=images[32:])


@NAMES
def test_it_is_evaluated_as_before(name, workdirs):
    expected = read(workdirs / "expected.json")[name]["evaluation"]
    found = evaluate(workdirs / name, data(workdirs))
    for figure in ("reconstruction_loss", "quantizer_loss", "loss", "psnr", "ssim"):
        assert found[figure] == pytest.approx(expected[figure], rel=TOLERANCE), figure
    for figure in ("step", "num_quantized_vectors", "effective_codebook_size", "quantizer"):
        assert found[figure] == expected[figure]
    # The code model beside the checkpoint is found again, and streams have their length.
    for figure in ("coded_bits_per_vector", "context_coded_bits_per_vector", "vocabulary_size"):
        assert found[figure] == pytest.approx(expected[figure], rel=0.02), figure


@NAMES
def test_it_resumes_as_before(name, workdirs, tmp_path):
    expected = read(workdirs / "expected.json")[name]["step_6"]
    shutil.copytree(workdirs / name / "checkpoints", tmp_path / "checkpoints")
    config = {**to_dict(checkpointing.config_of(tmp_path)), "num_train_steps": 6}
    state = train_and_evaluate(config, tmp_path, data(workdirs))
    assert int(state.step) == 6
    leaves = jax.tree.leaves_with_path((state.params, state.statistics))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.sqrt(
            np.mean(np.square(np.asarray(leaf, np.float64)))
        )
        for path, leaf in leaves
    }
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-9)


@NAMES
def test_a_run_starts_from_it(name, workdirs, tmp_path):
    saved = checkpointing.config_of(workdirs / name)
    config = {**to_dict(saved), "init_from": str(workdirs / name), "learning_rate": 0.0}
    config |= {"num_train_steps": 1, "schedule": "constant"}
    state = train_and_evaluate(config, tmp_path, data(workdirs))
    old = checkpointing.load(workdirs / name).state
    for ours, theirs in zip(
        jax.tree.leaves(state.params["decoder"]),
        jax.tree.leaves(old.params["decoder"]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@NAMES
def test_it_is_exported(name, workdirs, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    (tmp_path / "index.json").write_text("{}")
    export.export(workdirs / name, "none", f"old/{name}")
    images = data(workdirs)._splits["test"]
    ours, theirs = (load_pretrained(each) for each in (f"old/{name}", workdirs / name))
    np.testing.assert_array_equal(ours.encode(images), theirs.encode(images))
