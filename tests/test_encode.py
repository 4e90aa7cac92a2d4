"""A data set's tokens, read without llvq, against NumPy; and that the files are always the same."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import grain
import tensorflow_datasets as tfds
from flax import nnx

import input_pipeline
from input_pipeline.tokens import TokenWriter
from llvq import checkpointing, codec, load_pretrained
from llvq.data import ArrayDataset
from llvq.errors import UserError
from llvq.models import VQVAE
from tests import fuzz_targets, groups, run_encode
from tests.groups import ROOT
from tests.real_data import needs_files
from tests.run_encode import CODEBOOK, LATTICE, MODELS, MOST_CODES, images, run

SPLITS = ("train", "validation", "test")
NUM_SHARDS = {"train": 9, "validation": 3, "test": 3}  # of 70, 21 and 19 images, 8 in each


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{model: a checkpoint without a code model}, to be copied."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        run_encode.save_checkpoint(name, directory / name)
    return {name: directory / name for name in MODELS}


def make_workdir(checkpoints, name, workdir):
    """A run's workdir, with a code model yet to be estimated."""
    shutil.copytree(checkpoints[name], workdir / "checkpoints/1")
    return workdir


@pytest.fixture(scope="module")
def all_encoded(checkpoints, tmp_path_factory):
    """{model: what was encoded with it, on eight devices}; to be read only."""
    found = {}
    for name in MODELS:
        workdir = make_workdir(checkpoints, name, tmp_path_factory.mktemp(name))
        directory = run(name, workdir)
        manifest = json.loads((directory / "manifest.json").read_text())
        model = checkpointing.model_of(checkpointing.load(workdir))
        found[name] = SimpleNamespace(
            name=name,
            workdir=workdir,
            directory=directory,
            manifest=manifest,
            vocabulary=np.load(directory / "vocabulary.npy"),
            model=model,
            codes=codes_by_hand(model, *manifest["value_range"]),
            files=contents(directory),
        )
    return found


@pytest.fixture(params=[CODEBOOK, LATTICE])
def encoded(request, all_encoded):
    return all_encoded[request.param]


@pytest.fixture(params=MODELS)
def any_encoded(request, all_encoded):
    return all_encoded[request.param]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read(directory, split):
    """The tokens of a split, as TFDS gives them."""
    source = tfds.builder_from_directory(directory).as_data_source(split)
    return np.stack([example["tokens"] for example in source])


_encode = nnx.jit(VQVAE.encode)


def codes_by_hand(model, low, high):
    """{split: codes [images, vectors, integers of a code]}, in one unsharded batch of floats."""
    pixels = np.concatenate(list(images().values()))
    codes = np.asarray(_encode(model, np.float32(low + pixels / 255 * (high - low))))
    ends = np.cumsum([len(part) for part in images().values()])[:-1]
    return dict(zip(SPLITS, np.split(codes.reshape(len(pixels), 36, -1), ends), strict=True))


def all_rows(codes):
    return codes.reshape(-1, codes.shape[-1])


def vectors(encoded, rows):
    quantizer = encoded.model.quantizer
    found = quantizer.lookup(rows if quantizer.code_width > 1 else rows[:, 0])
    return np.asarray(found, np.float64)


def assert_tokens(encoded, tokens, codes):
    """Each is its code's place in the vocabulary or, where there is none, the nearest one's.

    Returns how many codes have no place.
    """
    places = {tuple(row): place for place, row in enumerate(encoded.vocabulary.tolist())}
    expected = np.array([places.get(tuple(row), -1) for row in codes.tolist()])
    actual = tokens.reshape(-1)
    has_place = expected >= 0
    np.testing.assert_array_equal(actual[has_place], expected[has_place])
    outside, entries = vectors(encoded, codes[~has_place]), vectors(encoded, encoded.vocabulary)
    distances = np.sum((outside[:, None] - entries) ** 2, axis=-1)
    taken = distances[np.arange(len(outside)), actual[~has_place]]
    # Several points of a lattice may be equally near, but for the rounding of float32.
    rounding = 4 * np.finfo(np.float32).eps * np.max(np.sum(outside**2, axis=-1), initial=0)
    np.testing.assert_array_less(taken, distances.min(axis=1) + rounding)
    return len(outside)


def test_tfds_reads_every_token_in_order(encoded):
    num_outside = {
        split: assert_tokens(
            encoded, read(encoded.directory, split), all_rows(encoded.codes[split])
        )
        for split in SPLITS
    }
    assert num_outside["test"] > 10
    stated = dict.fromkeys(SPLITS, 0)
    for shard in encoded.manifest["shards"].values():
        stated[shard["split"]] += shard["num_outside_vocabulary"]
    assert stated == num_outside


def test_the_nearest_entry_is_mostly_the_only_one(encoded):
    """So that the test above can tell."""
    codes = np.unique(all_rows(encoded.codes["test"]), axis=0)
    known = set(map(tuple, encoded.vocabulary.tolist()))
    outside = np.array([row for row in codes.tolist() if tuple(row) not in known])
    entries = vectors(encoded, encoded.vocabulary)
    distances = np.sort(np.sum((vectors(encoded, outside)[:, None] - entries) ** 2, axis=-1))
    assert np.mean(distances[:, 1] > 1.01 * distances[:, 0]) > 0.5


@pytest.mark.parametrize("split", ["train", "test"])
def test_grain_reads_the_same(encoded, split):
    source = tfds.builder_from_directory(encoded.directory).as_data_source(split)
    expected = read(encoded.directory, split)
    dataset = grain.MapDataset.source(source)
    assert len(dataset) == len(expected) == len(images()[split])
    np.testing.assert_array_equal([example["tokens"] for example in dataset], expected)
    order = grain.samplers.IndexSampler(
        len(source), shard_options=grain.sharding.NoSharding(), shuffle=False, num_epochs=1, seed=0
    )
    batches = grain.DataLoader(
        data_source=source, sampler=order, operations=[grain.transforms.Batch(16)]
    )
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(tokens, expected)


WITHOUT_LLVQ = """
import sys
sys.modules["llvq"] = sys.modules["input_pipeline"] = None  # as if they were not there
import grain
import numpy as np
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("validation")
np.save(sys.argv[2], [example["tokens"] for example in grain.MapDataset.source(source)])
"""


@pytest.mark.slow
def test_they_are_read_where_there_is_no_llvq(all_encoded, tmp_path):
    directory = all_encoded[LATTICE].directory
    command = [sys.executable, "-c", WITHOUT_LLVQ, str(directory), str(tmp_path / "tokens.npy")]
    subprocess.run(command, cwd=tmp_path, check=True)
    tokens = np.load(tmp_path / "tokens.npy")
    np.testing.assert_array_equal(tokens, read(directory, "validation"))


def test_the_vocabulary_is_by_falling_frequency_in_training(encoded):
    codes, counts = np.unique(all_rows(encoded.codes["train"]), axis=0, return_counts=True)
    count = dict(zip(map(tuple, codes.tolist()), counts.tolist(), strict=True))
    actual = [count.pop(tuple(row)) for row in encoded.vocabulary.tolist()]
    most = MOST_CODES if encoded.name == CODEBOOK else None
    assert actual == sorted(counts[counts > 1].tolist(), reverse=True)[:most]
    assert len(set(actual)) > 5


def sha256_of_arrays(tree):
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(tree)):
        digest.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def test_the_manifest_is_true(encoded):
    manifest = dict(encoded.manifest)
    state = checkpointing.load(encoded.workdir).state
    of_range = hashlib.sha256(b"[-0.5, 0.5]").hexdigest()
    of_arrays = [sha256_of_arrays(tree) for tree in (state.params, state.statistics)]
    assert manifest.pop("parameters") == "".join(digest[:16] for digest in (*of_arrays, of_range))
    with np.load(encoded.workdir / "checkpoints/1/code_model.npz") as kept:
        assert manifest.pop("code_model") == json.loads(str(kept["about"]))["digest"]
        np.testing.assert_array_equal(kept["vocabulary"], encoded.vocabulary)
    sizes = {CODEBOOK: (MOST_CODES, "uint8"), LATTICE: (295, "uint16")}
    shards = manifest.pop("shards")
    assert manifest.pop("preprocessing").startswith("uint8 pixels mapped linearly to value_range")
    assert manifest.pop("order").startswith("images in the data set's order; tokens row by row")
    assert manifest.pop("vocabulary").startswith("vocabulary.npy: ")
    assert manifest == {
        "dataset": "tiny",
        "num_images": {"train": 70, "validation": 21, "test": 19},
        "fit": "",
        "images": hashlib.sha256(
            b"".join(part.tobytes() for part in images().values())
        ).hexdigest()[:16],
        "quantizer": {CODEBOOK: "vq", LATTICE: "dense_lattice"}[encoded.name],
        "step": 0,
        "image_shape": [12, 12, 1],
        "value_range": [-0.5, 0.5],
        "token_shape": [6, 6],
        "vocabulary_size": sizes[encoded.name][0],
        "dtype": sizes[encoded.name][1],
    }
    assert len(encoded.vocabulary) == manifest["vocabulary_size"]
    assert read(encoded.directory, "train").dtype == manifest["dtype"]
    check_shards(encoded, shards)


def check_shards(encoded, shards):
    """Each shard is what the manifest says of it, and all are there."""
    names = [
        f"tiny_tokens-{split}.array_record-{i:05d}-of-{count:05d}"
        for split, count in NUM_SHARDS.items()
        for i in range(count)
    ]
    assert list(shards) == names
    assert [name for name in sorted(encoded.files) if "array_record" in name] == sorted(names)
    known = set(map(tuple, encoded.vocabulary.tolist()))
    for split in SPLITS:
        for i, name in enumerate(name for name in names if f"-{split}." in name):
            part = encoded.codes[split][8 * i : 8 * i + 8]
            assert shards[name] == {
                "split": split,
                "num_images": len(part),
                "sha256": hashlib.sha256(encoded.files[name]).hexdigest(),
                "num_outside_vocabulary": sum(
                    tuple(row) not in known for row in all_rows(part).tolist()
                ),
            }


def test_the_model_is_the_one_that_streams_name(encoded):
    """Bytes 6 to 14 of a stream are the start of its model's digest."""
    stream = codec.encode(load_pretrained(encoded.workdir), images()["test"][:1])
    assert stream[6:14].hex() == encoded.manifest["code_model"][:16]


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")],
)
def test_integers_are_as_small_as_suffices(num_tokens, dtype, tmp_path):
    writer = TokenWriter(tmp_path / "tokens", "tiny", {"train": 3}, 2, (1, 2), num_tokens)
    writer.begin({}, np.zeros((1, 1), np.int32))
    tokens = np.array([0, num_tokens - 1, num_tokens // 2] * 2, np.int32).reshape(3, 1, 2)
    for shard in writer.shards:
        part = slice(shard.positions.start, shard.positions.stop)
        writer.write(shard, tokens[part], 0)
    assert writer.finish({})["dtype"] == dtype
    found = read(tmp_path / "tokens", "train")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, tokens)


def assert_same_files(directory, expected):
    actual = contents(directory)
    assert actual.keys() == expected.keys()
    for name, data in expected.items():
        assert actual[name] == data, name


def test_another_batch_size_makes_the_same_files(any_encoded, checkpoints, tmp_path):
    """One that does not divide by the devices, either."""
    workdir = make_workdir(checkpoints, any_encoded.name, tmp_path)
    assert_same_files(run(any_encoded.name, workdir, batch_size=7), any_encoded.files)
    assert len(any_encoded.vocabulary) > 5  # so that the files could differ


def test_nothing_is_flipped(all_encoded, checkpoints, tmp_path):
    workdir = make_workdir(checkpoints, CODEBOOK, tmp_path)
    data = ArrayDataset(flip=True, **images())
    assert_same_files(run(CODEBOOK, workdir, data=data), all_encoded[CODEBOOK].files)


def test_one_device_writes_the_same_files(any_encoded, checkpoints, tmp_path, monkeypatch):
    devices = jax.local_devices()
    assert len(devices) == 8
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    workdir = make_workdir(checkpoints, any_encoded.name, tmp_path)
    assert_same_files(run(any_encoded.name, workdir), any_encoded.files)


def test_another_workdir_gets_the_same_files(all_encoded, tmp_path):
    encoded = all_encoded[CODEBOOK]
    directory = run(CODEBOOK, tmp_path / "new/one", checkpoint=encoded.workdir)
    assert directory == tmp_path / "new/one/tokens"
    assert_same_files(directory, encoded.files)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_writes_the_same_files(count, all_encoded, checkpoints, tmp_path):
    for name in MODELS:
        make_workdir(checkpoints, name, tmp_path / name)
    address = groups.free_address()
    commands = [
        ("-m", "tests.run_encode", tmp_path, ",".join(MODELS), address, count, i)
        for i in range(count)
    ]
    with groups.group(*commands) as processes:
        for code, errors in groups.finish(processes, timeout=500):
            assert code == 0, errors
    for name, encoded in all_encoded.items():
        assert_same_files(tmp_path / name / "tokens", encoded.files)


class StoppedWriter(TokenWriter):
    """Its process ends once seven shards are written."""

    def write(self, shard, tokens, num_outside):
        if shard == self.shards[7]:
            raise KeyboardInterrupt
        super().write(shard, tokens, num_outside)


@pytest.fixture(scope="module")
def stopped(checkpoints, tmp_path_factory):
    """A workdir in which seven of the codebook's shards are finished; to be copied."""
    workdir = make_workdir(checkpoints, CODEBOOK, tmp_path_factory.mktemp("stopped"))
    with pytest.raises(KeyboardInterrupt):
        run(CODEBOOK, workdir, make_writer=StoppedWriter)
    assert not (workdir / "tokens/manifest.json").exists()
    return workdir


def go_on(workdir):
    """Completes what was begun; the names of the shards that it writes."""
    written = []

    class NotingWriter(TokenWriter):
        def write(self, shard, tokens, num_outside):
            written.append(shard.file_name)
            super().write(shard, tokens, num_outside)

    run(CODEBOOK, workdir, make_writer=NotingWriter)
    return written


def identity(path):
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def test_what_is_finished_is_not_written_again(stopped, all_encoded, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    encoded = all_encoded[CODEBOOK]
    names = list(encoded.manifest["shards"])
    finished = [workdir / "tokens" / name for name in names[:7]]
    before = [identity(path) for path in finished]
    assert go_on(workdir) == names[7:]
    assert [identity(path) for path in finished] == before
    assert_same_files(workdir / "tokens", encoded.files)
    manifest = workdir / "tokens/manifest.json"
    when = identity(manifest)
    assert go_on(workdir) == []
    assert identity(manifest) == when


def flip_a_byte(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(b"tokens")] ^= 1
    shard.write_bytes(data)


def note(content):
    return lambda shard: Path(f"{shard}.json").write_text(content)


def test_damaged_shards_are_written_anew(stopped, all_encoded, tmp_path):
    damage = [
        flip_a_byte,
        Path.unlink,
        lambda shard: shard.write_bytes(b""),
        lambda shard: Path(f"{shard}.json").unlink(),
        note('{"sha256": "00'),
    ]
    check_damage(damage, stopped, all_encoded[CODEBOOK], tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_where_a_note_is_another_files_the_shard_is_written_anew(
    content, stopped, all_encoded, tmp_path
):
    check_damage([note(content)], stopped, all_encoded[CODEBOOK], tmp_path)


def check_damage(damage, stopped, encoded, directory):
    """Damages some of the finished shards, each in one way, and goes on."""
    workdir = shutil.copytree(stopped, directory / "run")
    names = list(encoded.manifest["shards"])
    for name, harm in zip(names, damage, strict=False):
        harm(workdir / "tokens" / name)
    assert go_on(workdir) == names[: len(damage)] + names[7:]
    assert_same_files(workdir / "tokens", encoded.files)


@pytest.mark.slow
def test_after_a_kill_the_next_call_writes_the_rest(all_encoded, checkpoints, tmp_path):
    """The process dies in the middle of its second shard."""
    workdir = make_workdir(checkpoints, CODEBOOK, tmp_path / CODEBOOK)
    with groups.group(("-m", "tests.run_encode", tmp_path, CODEBOOK, "kill")) as processes:
        ((code, errors),) = groups.finish(processes)
    assert code == -signal.SIGKILL, errors
    encoded = all_encoded[CODEBOOK]
    names = list(encoded.manifest["shards"])
    first = workdir / "tokens" / names[0]
    assert [path.name for path in sorted(first.parent.glob("*array_record*"))] == [
        names[0],
        f"{names[0]}.json",
        f"{names[1]}.unfinished",
    ]
    before = identity(first)
    assert go_on(workdir) == names[1:]
    assert identity(first) == before
    assert_same_files(workdir / "tokens", encoded.files)


def assert_says(error, *words):
    for word in words:
        assert str(word) in str(error.value)


def test_tokens_of_another_model_are_left_alone(all_encoded, tmp_path):
    encoded = all_encoded[CODEBOOK]
    directory = shutil.copytree(encoded.directory, tmp_path / "run/tokens")
    run_encode.save_checkpoint(CODEBOOK, tmp_path / "other", seed=0)
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path / "run", checkpoint=tmp_path / "other")
    assert_says(error, directory, "another model", "move it away")
    assert_same_files(directory, encoded.files)


@pytest.mark.parametrize(
    "changes", [{"train": images()["train"][::-1]}, {"test": images()["test"][:-1]}]
)
def test_tokens_of_other_images_are_left_alone(changes, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    before = contents(workdir / "tokens")
    data = ArrayDataset(**{**images(), **changes})
    with pytest.raises(UserError) as error:
        run(CODEBOOK, workdir, data=data)
    assert_says(error, workdir / "tokens", "data set", "move it away")
    assert_same_files(workdir / "tokens", before)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_directory_of_something_else_is_left_alone(content, checkpoints, tmp_path):
    workdir = make_workdir(checkpoints, CODEBOOK, tmp_path)
    (workdir / "tokens").mkdir()
    (workdir / "tokens/job.json").write_text(content)
    with pytest.raises(UserError) as error:
        run(CODEBOOK, workdir)
    assert_says(error, workdir / "tokens", "away")
    assert contents(workdir / "tokens") == {"job.json": content.encode()}


def test_a_mistyped_workdir_is_not_made(tmp_path):
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path / "mistyped")
    assert_says(error, "no checkpoint in", tmp_path / "mistyped")
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_made_is_one_line(all_encoded, tmp_path):
    encoded = all_encoded[CODEBOOK]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path / "file/run", checkpoint=encoded.workdir)
    assert_says(error, tmp_path / "file/run", "cannot be written")


@pytest.mark.parametrize(
    "name",
    [
        "vocabulary.npy",
        "tiny_tokens-train.array_record-00000-of-00009",
        "tiny_tokens-train.array_record-00000-of-00009.json",
        "dataset_info.json",
        "features.json",
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(name, all_encoded, tmp_path):
    """A directory is in its place."""
    (tmp_path / "tokens" / name).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path, checkpoint=all_encoded[CODEBOOK].workdir)
    assert_says(error, tmp_path / "tokens", "cannot be written")


def test_tokens_that_are_a_file_are_one_line(all_encoded, tmp_path):
    (tmp_path / "tokens").write_text("in the way")
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path, checkpoint=all_encoded[CODEBOOK].workdir)
    assert_says(error, tmp_path / "tokens", "cannot be written")
    assert (tmp_path / "tokens").read_text() == "in the way"


def test_another_models_checkpoint_is_refused(all_encoded, tmp_path):
    encoded = all_encoded[CODEBOOK]
    with pytest.raises(UserError) as error:
        run(CODEBOOK, tmp_path, checkpoint=encoded.workdir, **{"model.latent_dim": 4})
    assert_says(error, encoded.workdir / "checkpoints/1", "model.latent_dim")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["train", "evaluate", "encode"])
def test_a_checkpoint_is_named_for_evaluating_and_encoding_only(mode, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ("--config=configs/fashion_mnist.py:vq", "--workdir=/nowhere", "--checkpoint=/other")
    outcome, line = fuzz_targets.parse([*flags, f"--mode={mode}"])
    if mode == "train":
        assert outcome == "refused"
        assert line == "main.py: --checkpoint is for --mode=evaluate and --mode=encode only"
    else:
        assert outcome != "refused"


def main(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    config = [
        "--config=configs/fashion_mnist.py:sparse_lattice",
        "--config.num_train_steps=10",
        "--config.quantizer.codebook_size=16_777_216",  # a fine lattice: some hundred codes
        "--config.model.hidden_dims=(8,)",
        "--config.model.latent_dim=8",
        "--config.model.num_residual_blocks=0",
    ]
    return subprocess.run(
        [sys.executable, "main.py", *config, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.long  # 70,000 images
@needs_files
def test_main_encodes_the_real_data(tmp_path):
    workdir = f"--workdir={tmp_path}"
    refused = main(workdir, "--mode=encode")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("main.py: no checkpoint in")
    assert not list(tmp_path.iterdir())
    for mode in ("train", "encode"):
        result = main(workdir, f"--mode={mode}")
        assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/tokens has 13,720,000 tokens of " in result.stderr

    data, model = input_pipeline.load("fashion_mnist"), load_pretrained(tmp_path)
    vocabulary = np.load(tmp_path / "tokens/vocabulary.npy")
    builder = tfds.builder_from_directory(tmp_path / "tokens")
    for split, count in (("train", 55_000), ("validation", 5_000), ("test", 10_000)):
        source = builder.as_data_source(split)
        assert len(source) == count
        last = range(count - 50, count)
        tokens = np.stack([source[i]["tokens"] for i in last])
        assert len(np.unique(tokens)) > 10
        codes = np.asarray(model.encode(data.resident(split)[last]))
        # Few codes differ: the other process has compiled with other options, and rare codes have
        # become others.
        assert np.mean(np.all(vocabulary[tokens] == codes, axis=-1)) > 0.999
