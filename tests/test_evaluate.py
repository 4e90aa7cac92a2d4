"""Evaluation against NumPy over the whole split at once."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from llvq import Codec, checkpointing, evaluate, load_pretrained, train
from llvq.config import DatasetConfig
from llvq.data import ArrayDataset
from llvq.data.files import writing
from llvq.errors import UserError
from llvq.evaluation.evaluator import Evaluator
from llvq.evaluation.pictures import write_png
from llvq.runtime import sharding
from llvq.usage.table import CodebookUsage
from tests import tiny
from tests.runs import fitted_graphdef, objective


@pytest.fixture(scope="module", params=["vq", "dense_lattice"])
def run(request, tmp_path_factory):
    """(config, workdir, final state) of a short run."""
    config = tiny.config(
        request.param,
        num_train_steps=100,
        learning_rate=1e-2,
        eval_every_steps=100,
        checkpoint_every_steps=100,
    )
    workdir = tmp_path_factory.mktemp(request.param)
    return config, workdir, train.train_and_evaluate(config, workdir, tiny.dataset())


def test_what_is_loaded_is_what_was_trained(run):
    _, workdir, state = run
    loaded = checkpointing.load(workdir).state
    for ours, theirs in ((state.params, loaded.params), (state.statistics, loaded.statistics)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert int(loaded.step) == 100


def by_hand(workdir, images):
    """(scaled images, reconstructions, codes) of all images in one unsharded batch."""
    model = checkpointing.model_of(checkpointing.load(workdir))
    scaled = images / np.float32(255) - np.float32(0.5)
    outputs, codes, *_ = nnx.jit(lambda model, images: model(images))(model, scaled)
    return scaled.astype(np.float64), np.asarray(outputs, np.float64), np.asarray(codes)


def check_rates(workdir, results):
    """The rates are those of streams of all test codes, under tables of the training split."""
    codec = Codec.load(workdir)
    codes = by_hand(workdir, tiny.images(19, 2))[2]
    num_vectors = 19 * 36
    bits = {contexts: 8 * len(codec.compress_codes(codes, contexts)) for contexts in (False, True)}
    # A code at the border of two cells may fall to either side in a batch of another size.
    close = functools.partial(pytest.approx, rel=1e-3)
    assert results["coded_bits_per_vector"] == close(bits[False] / num_vectors)
    assert results["context_coded_bits_per_vector"] == close(bits[True] / num_vectors)
    assert results["coded_bits_per_pixel"] == close(bits[False] / num_vectors * 36 / 144)
    with_tables = bits[False] + 8 * codec.code_model.num_table_bytes
    assert results["coded_bits_per_vector_with_tables"] == close(with_tables / num_vectors)
    rows = codes.reshape(num_vectors, -1)
    known = set(map(tuple, codec.code_model.vocabulary.tolist()))
    num_escaped = sum(tuple(row) not in known for row in rows.tolist())
    assert results["escaped_fraction"] == close(num_escaped / num_vectors)
    assert results["vocabulary_size"] == len(known)
    trained_on = by_hand(workdir, tiny.images(70))[2].reshape(70 * 36, -1)
    distinct, counts = np.unique(trained_on, axis=0, return_counts=True)
    assert set(map(tuple, distinct[counts > 1].tolist())) == known


def test_figures_pictures_and_files(run):
    config, workdir, _ = run
    results = evaluate.evaluate(workdir, tiny.dataset())
    assert json.loads((workdir / "evaluation.json").read_text()) == results
    assert results["step"] == 100
    assert results["split"] == "test"

    scaled, outputs, _ = by_hand(workdir, tiny.images(19, 2))  # 16 + 3 images, filled up to 16
    squares = np.mean((scaled - outputs) ** 2, axis=(1, 2, 3))
    assert results["reconstruction_loss"] == pytest.approx(squares.mean(), rel=1e-5)
    clipped = np.mean((scaled - np.clip(outputs, -0.5, 0.5)) ** 2, axis=(1, 2, 3))
    assert results["psnr"] == pytest.approx(np.mean(-10 * np.log10(clipped)), rel=1e-5)
    to_unit = [np.float32(np.clip(x + 0.5, 0, 1)) for x in (scaled, outputs)]
    ssim = pytest.importorskip("tensorflow").image.ssim(*to_unit, max_val=1.0)
    assert results["ssim"] == pytest.approx(np.mean(ssim), rel=1e-4)
    assert results["loss"] == pytest.approx(
        results["reconstruction_loss"] + results["quantizer_loss"]
    )

    everything = np.concatenate([tiny.images(70), tiny.images(21, 1)])
    codes = by_hand(workdir, everything)[2].reshape(91 * 36, -1)
    _, counts = np.unique(codes, axis=0, return_counts=True)
    frequencies = counts / counts.sum()
    assert results["num_quantized_vectors"] == 91 * 36
    assert results["effective_codebook_size"] == len(counts)
    assert results["effective_codebook_size_is_exact"] is True
    assert results["effective_codebook_size_relative_error"] == 0
    if config["quantizer"]["name"] == "dense_lattice":
        assert len(counts) > 100
        assert results["basis_directions_in_use"] == np.sum(np.ptp(codes, axis=0) > 0)
    else:
        assert "basis_directions_in_use" not in results
        assert results["codebook_utilization"] == len(counts) / 512
    # Float64 sums of some thousand terms in another order.
    entropy = -np.sum(frequencies * np.log2(frequencies))
    assert results["plug_in_entropy_bits_per_vector"] == pytest.approx(entropy, rel=1e-12)
    assert results["plug_in_entropy_error_bits"] == 0
    assert results["perplexity"] == pytest.approx(2**entropy, rel=1e-12)
    check_rates(workdir, results)
    header = (workdir / "reconstructions.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[i : i + 4]) for i in (16, 20))
    assert (width, height) == (8 * 12 * 10, 2 * 12 * 10)  # eight pairs, enlarged tenfold


@pytest.mark.parametrize(
    "num_devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 8]
)
def test_any_number_of_devices_counts_every_image_once(run, num_devices):
    config, workdir, _ = run
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    evaluator = Evaluator(fitted_graphdef(config, mesh), objective(config), mesh)
    state = jax.device_put(checkpointing.load(workdir).state, sharding.replicated(mesh))

    for batch_size in (8, 16, 64):
        usage = CodebookUsage()
        means = evaluator.measure(state, tiny.dataset(), "validation", batch_size, usage)
        scaled, outputs, codes = by_hand(workdir, tiny.images(21, 1))
        assert means["reconstruction_loss"] == pytest.approx(
            np.mean((scaled - outputs) ** 2), rel=1e-5
        )
        assert usage.num_vectors == 21 * 36
        assert usage.num_distinct == len(np.unique(codes.reshape(21 * 36, -1), axis=0))


def test_quantizer_losses_are_of_the_whole_split(run):
    _, workdir, _ = run
    model = checkpointing.model_of(checkpointing.load(workdir))
    latents = model.encoder(tiny.images(19, 2) / np.float32(255) - 0.5)
    _, _, loss, metrics = model.quantizer(latents)
    results = evaluate.evaluate(workdir, tiny.dataset())
    for name, value in {"quantizer_loss": loss, **metrics}.items():
        assert results[name] == pytest.approx(float(value), rel=1e-5)


def test_without_a_test_split_validation_stands_in(run, tmp_path):
    _, workdir, _ = run
    data = ArrayDataset(
        train=tiny.images(70), validation=tiny.images(21, 1), test=tiny.images(21, 1)[:0]
    )
    results = evaluate.evaluate(tmp_path, data, checkpoint=workdir)
    assert results["split"] == "validation"
    scaled, outputs, _ = by_hand(workdir, tiny.images(21, 1))
    assert results["reconstruction_loss"] == pytest.approx(
        np.mean((scaled - outputs) ** 2), rel=1e-5
    )


@pytest.mark.parametrize("which", ["workdir", "checkpoints", "step"])
def test_what_checkpoint_may_name(run, tmp_path, which):
    _, workdir, _ = run
    path = {
        "workdir": workdir,
        "checkpoints": workdir / "checkpoints",
        "step": workdir / "checkpoints" / "100",
    }[which]
    results = evaluate.evaluate(tmp_path, tiny.dataset(), checkpoint=path)
    assert results["checkpoint"] == str(workdir / "checkpoints" / "100")
    assert (tmp_path / "evaluation.json").exists()


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=rf"no checkpoint in {tmp_path}: train first"):
        evaluate.evaluate(tmp_path, tiny.dataset())


def test_another_data_set_is_refused(run, tmp_path):
    _, workdir, _ = run
    mnist = DatasetConfig("mnist")
    with pytest.raises(UserError, match=r"is of the data set 'tiny', not of 'mnist'"):
        evaluate.evaluate(tmp_path, tiny.dataset(), checkpoint=workdir, dataset=mnist)
    larger = ArrayDataset(**dict.fromkeys(("train", "validation"), np.zeros((2, 16, 12, 1), "u1")))
    with pytest.raises(UserError, match=r"image_shape=\(12, 12, 1\): must be \(16, 12, 1\)"):
        evaluate.evaluate(tmp_path, larger, checkpoint=workdir)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    config = tiny.config("vq", num_train_steps=2)
    train.train_and_evaluate(config, tmp_path, tiny.dataset())
    for path in (tmp_path / "checkpoints/2/state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"^checkpoint .*/2 cannot be read [^\n]*$"):
        evaluate.evaluate(tmp_path, tiny.dataset())


def test_bucket_paths_are_left_as_they_are():
    assert str(checkpointing.absolute("gs://bucket/runs/vq")) == "gs://bucket/runs/vq"
    assert str(checkpointing.absolute("runs/vq")) == str(pathlib.Path.cwd() / "runs/vq")


def test_evaluation_leaves_a_run_as_it_is(run):
    """So that a training may go on meanwhile."""
    _, workdir, _ = run

    def contents():
        files = (path for path in workdir.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if path.parent != workdir}

    before = contents()
    evaluate.evaluate(workdir, tiny.dataset())
    assert contents() == before
    assert {path.name for path in workdir.iterdir()} == {
        *("checkpoints", "evaluation.json", "reconstructions.png")
    }


@pytest.mark.slow
def test_an_exactly_reconstructed_image_leaves_valid_json(tmp_path):
    """An all-black model of all-black images: their mean PSNR must not be infinite."""
    config = tiny.config("vq", num_train_steps=1, **{"model.value_range": (0.0, 1.0)})
    black = np.zeros((16, 12, 12, 1), np.uint8)
    data = ArrayDataset(train=black, validation=black)
    state = train.train_and_evaluate(config, tmp_path / "run", data)
    params = jax.tree.map(np.zeros_like, state.params)  # every output is 0
    checkpointing.save_for_inference(tmp_path / "black", state.replace(params=params), config)
    results = evaluate.evaluate(tmp_path, data, checkpoint=tmp_path / "black")
    assert results["reconstruction_loss"] == 0
    assert results["psnr"] == pytest.approx(100, rel=1e-6)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)


def test_a_mistyped_workdir_is_not_created(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*/mistyped"):
        evaluate.evaluate(tmp_path / "mistyped", tiny.dataset())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer",
    [
        *("fsq", "lfq", "bsq", "simvq", "residual_vq"),
        *("diagonal_lattice", "leech_lattice", "learned_lattice"),
    ],
)
def test_every_quantizer_goes_the_whole_way(quantizer, tmp_path):
    """Trains, evaluates, and codes images: what the codec decodes is what was encoded."""
    config = tiny.config(quantizer)
    train.train_and_evaluate(config, tmp_path, tiny.dataset())
    results = evaluate.evaluate(tmp_path, tiny.dataset())
    check_rates(tmp_path, results)
    codec = Codec.load(tmp_path)
    codes = by_hand(tmp_path, tiny.images(19, 2))[2]
    stream = codec.compress(tiny.images(19, 2))
    np.testing.assert_array_equal(codec.decompress_codes(stream), codes)
    everything = by_hand(tmp_path, np.concatenate([tiny.images(70), tiny.images(21, 1)]))[2]
    distinct = np.unique(everything.reshape(91 * 36, -1), axis=0)
    assert results["effective_codebook_size"] == len(distinct)
    if num_codes := codec.model.quantizer.num_codes:
        assert results["codebook_utilization"] == len(distinct) / num_codes
    else:
        assert results["rate"] > 0
        assert results["density_coded_bits_per_vector"] > results["coded_bits_per_vector"]


def test_the_code_model_is_of_the_data_sets_training_split(tmp_path, caplog):
    """One that was fitted to other images stays, and the figures are not of it."""
    config = tiny.config("vq")
    train.train_and_evaluate(config, tmp_path / "run", tiny.dataset())
    trained = tmp_path / "run"
    expected = evaluate.evaluate(tmp_path / "a", tiny.dataset(), checkpoint=trained)
    (path,) = trained.rglob("code_model.npz")
    path.unlink()
    Codec.fit(load_pretrained(trained), tiny.images(1, seed=9)).save(path.parent)
    kept = path.read_bytes()
    found = evaluate.evaluate(tmp_path / "found", tiny.dataset(), checkpoint=tmp_path / "run")
    assert found["coded_bits_per_vector"] == expected["coded_bits_per_vector"]
    assert path.read_bytes() == kept
    assert "keeps its code model of images chosen to fit it to" in caplog.text


def test_pictures_of_any_number_of_channels(tmp_path):
    for channels, shape in (
        (1, (256, 256)),
        (2, (256, 256)),
        (3, (256, 256, 3)),
        (5, (256, 256, 3)),
    ):
        write_png(tmp_path / "a.png", np.zeros((16, 16, channels), np.uint8))
        assert np.asarray(Image.open(tmp_path / "a.png")).shape == shape


def test_writers_of_one_file_do_not_meet(tmp_path):
    with writing(tmp_path / "a") as first, writing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
