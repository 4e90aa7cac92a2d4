"""The models that come with the project: exporting, loading, and as part of a package."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

import llvq
from llvq import checkpointing, evaluate, export, pretrained
from llvq.config import to_dict
from llvq.data import order
from llvq.errors import UserError
from llvq.models import factory
from tests import tiny
from tests.real_data import needs_files
from tests.runs import create_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = "python main.py --config=configs/tiny.py:vq_ema"
SHIPPED = llvq.pretrained_index()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of an evaluated run of 6 steps (not taken); vq_ema has parameters and statistics."""
    directory = tmp_path_factory.mktemp("run")
    config = tiny.config("vq_ema", **{"dataset.manual_dir": "/home/somebody"})
    state = create_state(config)
    with checkpointing.open_manager(directory, 1, "reconstruction_loss") as manager:
        checkpointing.save(manager, 6, state.replace(step=np.int32(6)), config, None)
    evaluate.evaluate(directory, tiny.dataset())
    return directory


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A directory of trained models with nothing in it."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "index.json").write_text("{}")
    monkeypatch.setattr(pretrained, "DIRECTORY", directory)
    return directory


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_exported_is_what_was_trained(workdir, shipped):
    export.main([f"--workdir={workdir}", f"--command={COMMAND}"])
    model = llvq.load_pretrained("tiny/vq_ema")
    checkpoint = checkpointing.load(workdir)
    state, trained = checkpoint.state, checkpointing.model_of(checkpoint)
    images = tiny.images(5) / np.float32(255) - np.float32(0.5)
    np.testing.assert_array_equal(model.reconstruct(images), trained.reconstruct(images))
    np.testing.assert_array_equal(model.decode(model.encode(images)), model.reconstruct(images))
    exported, of_run = (llvq.Codec.load(x).code_model for x in ("tiny/vq_ema", workdir))
    assert exported.digest == of_run.digest
    jax.tree.map(
        np.testing.assert_array_equal,
        *(
            (s.step, s.params, s.statistics)
            for s in (state, checkpointing.load(shipped / "tiny/vq_ema").state)
        ),
    )

    entry = llvq.pretrained_index()["tiny/vq_ema"]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert entry["command"] == COMMAND
    assert (entry["step"], entry["seed"]) == (6, 3)
    assert {"reconstruction_loss", "psnr", "ssim", "effective_codebook_size"} < set(
        entry["metrics"]
    )
    assert entry["metrics"].items() <= evaluation.items()
    assert entry["config"]["model"]["image_shape"] == (12, 12, 1)
    assert entry["config"]["model"]["value_range"] == (-0.5, 0.5)
    saved = to_dict(checkpointing.load(shipped / "tiny/vq_ema").config)
    for section in ("model", "quantizer", "dataset", "optimizer"):
        assert entry["config"][section].items() <= saved[section].items()


def test_what_is_exported_is_small_and_names_no_directory_of_this_machine(workdir, shipped):
    export.export(workdir, COMMAND)
    content = files(shipped)
    for path, data in content.items():
        for private in (str(workdir), str(shipped), "/home/somebody"):
            assert private.encode() not in data, path
    state = checkpointing.load(workdir).state
    numbers = factory.num_parameters((state.params, state.statistics))
    assert sum(map(len, content.values())) < 4 * numbers + 20_000


def test_it_evaluates_to_its_metrics(workdir, shipped, tmp_path):
    export.export(workdir, COMMAND)
    entry = llvq.pretrained_index()["tiny/vq_ema"]
    checkpoint = shipped / "tiny/vq_ema"
    results = evaluate.evaluate(tmp_path, tiny.dataset(), checkpoint=checkpoint)
    assert entry["metrics"].items() <= results.items()


def test_what_cannot_be_exported_is_one_line(workdir, shipped, tmp_path):
    def refusal(directory, *options):
        before = files(tmp_path)
        with pytest.raises(SystemExit) as error:
            export.main([f"--workdir={directory}", f"--command={COMMAND}", *options])
        assert files(tmp_path) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "no checkpoint in" in refusal(tmp_path / "empty")
    loaded = checkpointing.load(workdir)
    names = "model", "quantizer", "compute_dtype"
    imported = {name: to_dict(loaded.config)[name] for name in names}
    checkpointing.save_for_inference(tmp_path / "imported", loaded.state, imported)
    assert "does not say what it was trained on" in refusal(tmp_path / "imported")
    unevaluated = tmp_path / "unevaluated"
    shutil.copytree(workdir, unevaluated)
    newest = checkpointing.find(unevaluated)
    newest.rename(newest.parent / str(int(newest.name) + 1))
    assert "does not hold an evaluation of" in refusal(unevaluated)  # but of an older one
    (unevaluated / "evaluation.json").unlink()
    assert "run main.py --mode=evaluate" in refusal(unevaluated)
    (unevaluated / "evaluation.json").write_text("{")
    assert "does not hold an evaluation of" in refusal(unevaluated)
    assert "--name=../x: must be two words" in refusal(workdir, "--name=../x")
    export.export(workdir, COMMAND)
    assert "checkpoints/tiny/vq_ema exists already" in refusal(workdir)
    assert export.export(workdir, COMMAND, "photos/ema") == "photos/ema"
    llvq.Codec.load("photos/ema")


def test_unknown_names(workdir, shipped):
    with pytest.raises(
        UserError, match=r"^no trained model 'mnist/vq', nor .*: there are none yet$"
    ):
        llvq.load_pretrained("mnist/vq")
    export.export(workdir, COMMAND)
    for name in ("mnist/vq", "../checkpoints/tiny/vq_ema"):
        with pytest.raises(UserError, match=rf"^no trained model '{name}', nor .* tiny/vq_ema$"):
            llvq.load_pretrained(name)


def test_a_float64_model_needs_jax_to_have_float64(tmp_path):
    config = tiny.config("vq")
    state = create_state(config)
    checkpointing.save_for_inference(tmp_path, state, {**config, "compute_dtype": "float64"})
    with pytest.raises(UserError, match="float64: needs jax_enable_x64"):
        llvq.load_pretrained(tmp_path)


def test_the_index_lists_what_is_there():
    there = {path.parent for path in pretrained.DIRECTORY.rglob("_CHECKPOINT_METADATA")}
    assert {str(path.relative_to(pretrained.DIRECTORY)) for path in there} == set(SHIPPED)


def test_every_shipped_model_works():
    for name, entry in SHIPPED.items():
        model = llvq.load_pretrained(name)
        _, config, state = checkpointing.load(pretrained.DIRECTORY / name)
        config = to_dict(config)
        for section in ("model", "quantizer", "dataset"):
            assert entry["config"][section].items() <= config[section].items()
        family, quantizer = name.split("/")
        assert quantizer == config["quantizer"]["name"]
        assert family in (config["dataset"]["name"], "photos")
        assert (int(state.step), config["seed"]) == (entry["step"], entry["seed"])
        assert {"reconstruction_loss", "effective_codebook_size"} < set(entry["metrics"])
        assert entry["command"].startswith("python ")
        images = np.zeros((1, *config["model"]["image_shape"]), np.float32)
        reconstructions = model.decode(model.encode(images))
        assert reconstructions.shape == images.shape
        assert np.all(np.isfinite(reconstructions))
        size = sum(map(len, files(pretrained.DIRECTORY / name).values()))
        assert size < 2_000_000


@pytest.mark.slow
def test_an_installed_package_has_them(workdir, shipped, tmp_path):
    """Builds a wheel from a copy of the project and loads from it, far from the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
    export.export(workdir, COMMAND)
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llvq", source / "llvq", ignore=ignored)
    shutil.copytree(shipped, source / "checkpoints")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={tmp_path}", str(source)], check=True)
    (wheel,) = tmp_path.glob("llvq-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.rmtree(shipped)
    shutil.rmtree(source)
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import llvq, numpy
assert llvq.__file__.startswith({str(installed)!r})
assert list(llvq.pretrained_index()) == ["tiny/vq_ema"]
images = numpy.zeros((2, 12, 12, 1), numpy.float32)
print(llvq.load_pretrained("tiny/vq_ema").reconstruct(images).shape)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "(2, 12, 12, 1)\n", result.stderr
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text().splitlines()
    requirements = [line for line in metadata if line.startswith("Requires-Dist: torch")]
    assert requirements
    assert all("extra ==" in line for line in requirements)


@pytest.mark.slow
@needs_files
def test_a_shipped_model_is_as_good_as_the_index_says():
    """On the real test images; sums in float32 over batches of another size differ a little."""
    import input_pipeline

    name = "fashion_mnist/sparse_lattice"
    about = llvq.pretrained_index()[name]
    model = llvq.load_pretrained(name)
    low, high = about["config"]["model"]["value_range"]
    reconstruct = nnx.jit(lambda model, images: model.reconstruct(images))
    data = input_pipeline.load("fashion_mnist")
    squares = []
    for _, images in data.batches("test", order.evaluation_batches(10_000, 500)):
        inputs = (low + images / 255 * (high - low)).astype(np.float32)
        squares.append(np.mean((np.asarray(reconstruct(model, inputs)) - inputs) ** 2))
    expected = about["metrics"]["reconstruction_loss"]
    assert np.mean(squares) == pytest.approx(expected, rel=1e-5)
