"""Imported checkpoints: against PyTorch, the authors' own results, and files that are no such."""

import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="imports are from PyTorch")

from llvq import checkpointing, evaluate, import_torch, load_pretrained
from llvq.config import DatasetConfig, to_dict
from llvq.errors import UserError
from llvq.evaluation.evaluator import Evaluator
from llvq.fields import flatten
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training.objective import Objective
from llvq.usage import CodebookUsage
from tests import reference, tiny, torch_model
from tests.real_data import needs_files

HIDDEN_DIMS = {"fashion_mnist": (64,), "ffhq1024": (16, 32)}


def write(path, quantizer="vq", channels=1, hidden_dims=(8,), num_blocks=2, **sizes):
    """A Lightning file at a path, and the model in it."""
    torch.manual_seed(0)
    model = torch_model.Model(quantizer, channels, hidden_dims, num_blocks, **sizes)
    torch.save(torch_model.lightning_file(model), path)
    return model


def run(path, output):
    """The command; the line that it ends in if it fails."""
    try:
        import_torch.main([f"--checkpoint={path}", f"--output={output}"])
    except SystemExit as error:
        return str(error.code)
    return None


def assert_refused(path, tmp_path, *words):
    before = sorted(tmp_path.rglob("*"))
    line = run(path, tmp_path / "output")
    assert line.startswith("llvq.import_torch: ")
    assert "\n" not in line
    for word in (Path(path).name, *words):
        assert word in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("quantizer", "channels", "hidden_dims", "num_blocks"),
    [
        ("vq_ema", 3, (4, 8), 1),
        ("sparse_lattice", 2, (8, 4, 6), 3),
        *(
            pytest.param(name, 3, (4, 8), 1, marks=pytest.mark.slow)
            for name in tiny.PAPER
            if name != "vq_ema"
        ),
    ],
)
def test_any_model_is_recognised_and_computes_what_pytorch_does(
    quantizer, channels, hidden_dims, num_blocks, tmp_path, capsys
):
    path = tmp_path / "misleading_name_vq-ema.ckpt"
    theirs = write(path, quantizer, channels, hidden_dims, num_blocks, latent_dim=6, size=24)
    assert run(path, tmp_path / "imported") is None
    assert f"quantizer.name={quantizer}" in capsys.readouterr().out
    imported = checkpointing.load(tmp_path / "imported")
    _, config, state = imported
    assert (config.model.image_shape, config.model.latent_dim) == ((0, 0, channels), 6)
    assert config.model.options == {
        "hidden_dims": hidden_dims,
        "num_residual_blocks": num_blocks,
        "latent_activation": "leaky_relu",
        "output_activation": "leaky_relu",
    }
    assert config.quantizer.name == quantizer
    if quantizer in ("vq", "vq_ema"):
        assert config.quantizer.options["codebook_size"] == 24
    assert int(state.step) == 7
    assert state.opt_state == ()
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 16, 24, channels)).astype(np.float32)
    model = checkpointing.model_of(imported)
    np.testing.assert_allclose(model.reconstruct(images), theirs.reconstruct(images), atol=1e-5)
    if "lattice" in quantizer:
        assert len(np.unique(model.encode(images))) > 2  # the test would notice the wrong basis


@pytest.mark.parametrize(
    ("channels", "told", "expected"),
    [(1, (), (-0.5, 0.5)), (3, (), (0.0, 1.0)), (3, ("--value_range", "-1", "1"), (-1.0, 1.0))],
)
def test_the_value_range_is_the_authors_unless_told(channels, told, expected, tmp_path):
    path = tmp_path / "model.ckpt"
    write(path, "vq", channels=channels, size=24)
    import_torch.main([f"--checkpoint={path}", f"--output={tmp_path / 'imported'}", *told])
    model = load_pretrained(tmp_path / "imported")
    assert tuple(model.value_range) == expected
    with pytest.raises(UserError, match=r"--value_range=1.0 0.0 is impossible"):
        import_torch.import_checkpoint(path, tmp_path / "never", (1.0, 0.0))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("quantizer", ["vq_ema", "sparse_lattice"])
def test_it_is_evaluated_on_ones_own_data(quantizer, tmp_path):
    theirs = write(tmp_path / "model.ckpt", quantizer, size=512)
    import_torch.import_checkpoint(tmp_path / "model.ckpt", tmp_path / "imported")
    results = evaluate.evaluate(
        tmp_path / "run",
        tiny.dataset(),
        checkpoint=tmp_path / "imported",
        batch_size=16,
        dataset=DatasetConfig("tiny"),
    )
    assert results["dataset"] == "tiny"
    images = tiny.images(19, 2) / np.float32(255) - np.float32(0.5)
    error = np.mean((theirs.reconstruct(images).astype(np.float64) - images) ** 2)
    assert results["reconstruction_loss"] == pytest.approx(error, rel=1e-5)
    assert results["step"] == 7
    assert results["num_quantized_vectors"] == 91 * 36
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == results


def test_a_network_for_colour_images_does_not_pass_for_one_for_grey_ones(tmp_path):
    write(tmp_path / "model.ckpt", "vq", channels=3, size=512)
    import_torch.import_checkpoint(tmp_path / "model.ckpt", tmp_path / "imported")
    with pytest.raises(UserError, match=r"image_shape=\(0, 0, 3\): must be \(12, 12, 1\)"):
        evaluate.evaluate(tmp_path, tiny.dataset(), checkpoint=tmp_path / "imported")


class TouchesFile:
    """Pickles as a call that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_no_code_in_a_file_is_run(dump, tmp_path):
    mark = tmp_path / "mark"
    model = torch_model.Model("vq", 1, (8,))
    path = tmp_path / "evil.ckpt"
    dump(torch_model.lightning_file(model) | {"callbacks": TouchesFile(mark)}, path)
    assert_refused(path, tmp_path, "nothing in it was run")
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have been


def damaged(part):
    def write_damaged(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])

    return write_damaged


def changed(change):
    def write_changed(path):
        file = torch_model.lightning_file(torch_model.Model("vq_ema", 1, (8,)))
        change(file["state_dict"])
        torch.save(file, path)

    return write_changed


def put(name, value):
    return changed(lambda tensors: tensors.update({name: value}))


def drop(name):
    return changed(lambda tensors: tensors.pop(name))


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "no PyTorch file"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com\n"), "no PyTorch"),
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "no PyTorch file"),
    "zip": (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), "no PyTorch file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "no "),
    **{f"cut at {part}": (damaged(part), "no PyTorch") for part in (0.01, 0.5, 0.9, 0.999)},
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "no Lightning checkpoint"),
    "bare": (lambda path: torch.save({"a": torch.zeros(3)}, path), "state_dict"),
    "other model": (
        lambda path: torch.save(
            {"state_dict": torch.nn.Linear(3, 4).state_dict(), "global_step": 3}, path
        ),
        "weight [4, 3]",
    ),
    "no tensors": (lambda path: torch.save({"state_dict": {}, "global_step": 3}, path), "found no"),
    "unnamed": (
        lambda path: torch.save({"state_dict": {7: torch.ones(3)}, "global_step": 3}, path),
        "7 is torch.float32",
    ),
    "step": (lambda path: torch.save({"state_dict": {}, "global_step": 2**40}, path), "no Lightni"),
    "past": (lambda path: torch.save({"state_dict": {}, "global_step": -5}, path), "no Lightning"),
    "NaN": (put("_encoder.0.0.bias", torch.full((8,), torch.nan)), "0.0.bias holds NaN"),
    "no codebook": (drop("_quantizer.embedding.weight"), "_quantizer.embedding.weight"),
    "no cluster size": (drop("_quantizer.ema_cluster_size"), "quantizer.cluster_size is missing"),
    "no sums": (drop("_quantizer.ema_w"), "quantizer."),
    "no bias": (drop("_decoder.0.0.bias"), "decoder.mix.bias is missing"),
    "no last layer": (drop("_decoder.4.0.weight"), "decoder.upsample.0.kernel is missing"),
    "no first layer": (drop("_encoder.0.0.weight"), "_encoder.0.0.weight"),
    "no block": (drop("_decoder.1.resblock.2.weight"), "conv1x1.kernel is missing"),
    "extra layer": (put("_encoder.9.0.weight", torch.ones(8, 8, 3, 3)), "_encoder.9.0.weight"),
    "extra bias": (put("_encoder.2.resblock.0.bias", torch.ones(8)), "no such tensor"),
    "extra buffer": (put("_quantizer.anneal", torch.ones(8)), "_quantizer.anneal"),
    "foreign part": (put("_discriminator.0.weight", torch.ones(8)), "_discriminator.0.weight"),
    "wrong width": (put("_encoder.1.0.weight", torch.ones(8, 9, 3, 3)), "encoder.mix.kernel has"),
    "flat kernel": (put("_encoder.1.0.weight", torch.ones(8, 72)), "_encoder.1.0.weight"),
    "scalar": (put("_quantizer.embedding.weight", torch.ones(())), "[K, D]"),
    "wrong statistics": (put("_quantizer.ema_w", torch.ones(3)), "quantizer.ema_sum has"),
    "half precision": (put("_encoder.1.0.bias", torch.ones(8).half()), "torch.float16"),
    "no array": (put("_encoder.1.0.bias", 3), "_encoder.1.0.bias is int"),
    "sparse": (put("_encoder.1.0.bias", torch.ones(8).to_sparse()), "_encoder.1.0.bias"),
    "hollow": (put("_encoder.0.0.weight", torch.ones(0, 1, 4, 4)), "[0, 1, 4, 4]"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_one_line(kind, tmp_path):
    write_file, words = FOREIGN[kind]
    write_file(tmp_path / "file.ckpt")
    assert_refused(tmp_path / "file.ckpt", tmp_path, words)


def test_no_file(tmp_path):
    assert_refused(tmp_path / "missing.ckpt", tmp_path, "--checkpoint=", "No such file")
    (tmp_path / "directory.ckpt").mkdir()
    assert_refused(tmp_path / "directory.ckpt", tmp_path, "--checkpoint=", "directory")


def test_without_pytorch(tmp_path, monkeypatch):
    write(tmp_path / "model.ckpt")
    monkeypatch.setitem(sys.modules, "torch", None)
    line = run(tmp_path / "model.ckpt", tmp_path / "output")
    assert line.endswith('needs PyTorch: pip install "torch>=2.6"')


def test_with_a_pytorch_that_is_not_safe(tmp_path, monkeypatch):
    write(tmp_path / "model.ckpt")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cpu"))
    assert "CVE-2025-32434" in run(tmp_path / "model.ckpt", tmp_path / "output")


def test_where_it_cannot_be_written(tmp_path):
    path = tmp_path / "model.ckpt"
    write(path)
    (tmp_path / "output").mkdir()
    assert run(path, tmp_path / "output") is None  # an empty directory is fine
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    for output, words in (
        (tmp_path / "output", "exists already"),
        (path, "exists already"),
        (path / "below", "cannot be written"),
    ):
        line = run(path, output)
        assert str(output) in line
        assert words in line
        assert "\n" not in line
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


@reference.needs_reference
@pytest.mark.parametrize(("dataset", "quantizer"), list(reference.FILES))
def test_the_authors_files(dataset, quantizer, tmp_path):
    import_torch.import_checkpoint(reference.checkpoint(dataset, quantizer), tmp_path / "imported")
    imported = checkpointing.load(tmp_path / "imported")
    golden = reference.golden(dataset, quantizer)
    known = flatten(to_dict(imported.config))
    assert known["quantizer.name"] == quantizer
    assert known["model.image_shape"] == (0, 0, golden["images"].shape[-1])
    assert known["model.hidden_dims"] == HIDDEN_DIMS[dataset]
    assert (known["model.num_residual_blocks"], known["model.latent_dim"]) == (2, 64)
    ours = checkpointing.model_of(imported).reconstruct(golden["images"])
    theirs = golden["reconstruction"]
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.slow
@reference.needs_reference
@needs_files
def test_the_authors_lattice_on_the_real_test_images(tmp_path):
    import input_pipeline

    import_torch.import_checkpoint(
        reference.checkpoint("fashion_mnist", "sparse_lattice"), tmp_path / "imported"
    )
    _, config, state = checkpointing.load(tmp_path / "imported")
    mesh = sharding.make_mesh()
    graphdef = nnx.graphdef(factory.abstract_model(config.architecture))
    evaluator = Evaluator(graphdef, Objective(config.loss), mesh)
    means = evaluator.measure(
        jax.device_put(state, sharding.replicated(mesh)),
        input_pipeline.load("fashion_mnist", image_shape=(28, 28, 1)),
        "test",
        400,
        CodebookUsage(),
    )
    expected = reference.expected()["measured_fashion_mnist_cpu_float32"]["sparse_lattice"]
    assert means["reconstruction_loss"] == pytest.approx(expected["test_mse"], abs=1e-5)


@pytest.mark.long
@reference.needs_reference
@needs_files
@pytest.mark.parametrize("quantizer", tiny.PAPER)
def test_the_authors_figures_on_all_real_images(quantizer, tmp_path):
    import input_pipeline

    import_torch.import_checkpoint(
        reference.checkpoint("fashion_mnist", quantizer), tmp_path / "imported"
    )
    data = input_pipeline.load("fashion_mnist", image_shape=(28, 28, 1))
    results = evaluate.evaluate(tmp_path, data, checkpoint=tmp_path / "imported")
    expected = reference.expected()["measured_fashion_mnist_cpu_float32"][quantizer]
    assert results["reconstruction_loss"] == pytest.approx(expected["test_mse"], abs=1e-5)
    assert results["num_quantized_vectors"] == 11_760_000
    if quantizer == "dense_lattice":
        # In 392,000 vectors the authors' program has 2 % of repetitions; in all there are more.
        assert 0.9 * 11_760_000 < results["effective_codebook_size"] < 11_760_000
    else:
        tolerance = {"vq": 0, "vq_ema": 2, "sparse_lattice": 2}[quantizer]
        count = expected["effective_codebook_size"]
        assert abs(results["effective_codebook_size"] - count) <= tolerance
