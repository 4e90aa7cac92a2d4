"""A data set's tokens, read without llvq, against NumPy; and that the files are always the same."""

import contextlib
import hashlib
import json
import os
import shutil
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
from llvq import Codec, checkpointing, load_pretrained
from llvq.config import DatasetConfig
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
    if len(outside):  # mostly the nearest entry is the only one: what follows can tell
        first, second = np.sort(distances)[:, :2].T
        assert np.mean(second > 1.01 * first) > 0.3
    taken = distances[np.arange(len(outside)), actual[~has_place]]
    # Several points of a lattice may be equally near, but for the rounding of float32.
    rounding = 4 * np.finfo(np.float32).eps * np.max(np.sum(outside**2, axis=-1), initial=0)
    np.testing.assert_array_less(taken, distances.min(axis=1) + rounding)
    return len(outside)


def test_tfds_and_grain_read_every_token_in_order(encoded):
    num_outside = {}
    for split in SPLITS:
        tokens = read(encoded.directory, split)
        num_outside[split] = assert_tokens(encoded, tokens, all_rows(encoded.codes[split]))
        source = tfds.builder_from_directory(encoded.directory).as_data_source(split)
        assert len(source) == len(tokens) == len(images()[split])
        order = grain.samplers.SequentialSampler(len(source), grain.sharding.NoSharding())
        operations = [grain.transforms.Batch(16)]
        batches = grain.DataLoader(data_source=source, sampler=order, operations=operations)
        np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches]), tokens)
    assert num_outside["test"] > 10


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
    codec = Codec.load(encoded.workdir)
    np.testing.assert_array_equal(codec.code_model.vocabulary, encoded.vocabulary)
    # Bytes 6 to 14 of a stream are the start of the digest.
    stream = codec.compress(images()["test"][:1])
    assert manifest.pop("code_model")[:16] == stream[6:14].hex()
    for name in ("preprocessing", "order", "vocabulary"):
        assert manifest.pop(name)
    check_shards(encoded, manifest.pop("shards"))
    pixels = b"".join(part.tobytes() for part in images().values())
    assert manifest == {
        "dataset": "tiny",
        "num_images": {"train": 70, "validation": 21, "test": 19},
        "fit": "",
        "images": hashlib.sha256(pixels).hexdigest()[:16],
        "quantizer": {CODEBOOK: "vq", LATTICE: "dense_lattice"}[encoded.name],
        "step": 0,
        "image_shape": [12, 12, 1],
        "value_range": [-0.5, 0.5],
        "token_shape": [6, 6],
        "vocabulary_size": len(encoded.vocabulary),
        "dtype": str(read(encoded.directory, "train").dtype),
    }


def check_shards(encoded, shards):
    """Each shard is what the manifest says of it, and all are there."""
    known, expected = set(map(tuple, encoded.vocabulary.tolist())), {}
    for split, count in NUM_SHARDS.items():
        for i in range(count):
            part = encoded.codes[split][8 * i : 8 * i + 8]
            name = f"tiny_tokens-{split}.array_record-{i:05d}-of-{count:05d}"
            expected[name] = {
                "split": split,
                "num_images": len(part),
                "sha256": hashlib.sha256(encoded.files[name]).hexdigest(),
                "num_outside_vocabulary": sum(
                    tuple(row) not in known for row in all_rows(part).tolist()
                ),
            }
    assert list(shards.items()) == list(expected.items())
    assert {name for name in encoded.files if "array_record" in name} == expected.keys()


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


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_files_depend_on_the_checkpoint_and_the_images_alone(
    name, num_devices, all_encoded, checkpoints, tmp_path, monkeypatch
):
    """Another workdir, other devices, flipped images."""
    devices = jax.local_devices()
    assert len(devices) == 8
    assert len(all_encoded[name].vocabulary) > 5  # so that the files could differ
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:num_devices])
    checkpoint = make_workdir(checkpoints, name, tmp_path / "trained")
    data = ArrayDataset(flip=True, **images())
    directory = run(name, tmp_path / "new/one", checkpoint=checkpoint, data=data)
    assert directory == tmp_path / "new/one/tokens"
    assert_same_files(directory, all_encoded[name].files)


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


def write(workdir, most=100):
    """Encodes until so many shards are written; returns their names."""
    written = []

    class NotingWriter(TokenWriter):
        def write(self, shard, *rest):
            if len(written) == most:
                raise KeyboardInterrupt
            written.append(shard.file_name)
            super().write(shard, *rest)

    with contextlib.suppress(KeyboardInterrupt):
        run(CODEBOOK, workdir, make_writer=NotingWriter)
    return written


@pytest.fixture(scope="module")
def stopped(checkpoints, tmp_path_factory):
    """A workdir in which seven of the codebook's shards are finished; to be copied."""
    workdir = make_workdir(checkpoints, CODEBOOK, tmp_path_factory.mktemp("stopped"))
    assert len(write(workdir, most=7)) == 7
    assert not (workdir / "tokens/manifest.json").exists()
    return workdir


def test_what_is_finished_is_not_written_again(stopped, all_encoded, tmp_path):
    workdir, encoded = shutil.copytree(stopped, tmp_path / "run"), all_encoded[CODEBOOK]
    names = list(encoded.manifest["shards"])
    assert write(workdir) == names[7:]
    assert_same_files(workdir / "tokens", encoded.files)
    assert write(workdir) == []
    assert_same_files(workdir / "tokens", encoded.files)


def flip_a_byte(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(b"tokens")] ^= 1
    shard.write_bytes(data)


def note(content):
    return lambda shard: Path(f"{shard}.json").write_text(content)


def test_damaged_shards_are_written_again(stopped, all_encoded, tmp_path):
    """And what a killed process was writing is in nobody's way."""
    workdir = shutil.copytree(stopped, tmp_path / "run")
    names = list(all_encoded[CODEBOOK].manifest["shards"])
    damage = [
        flip_a_byte,
        Path.unlink,
        lambda shard: shard.write_bytes(b""),
        lambda shard: Path(f"{shard}.json").unlink(),
        note('{"sha256": "00'),
        note("{}"),
        note("[]"),
        lambda shard: Path(f"{shard}.unfinished").write_text("torn"),
    ]
    for name, harm in zip(names, damage, strict=False):
        harm(workdir / "tokens" / name)
    assert write(workdir) == names
    assert_same_files(workdir / "tokens", all_encoded[CODEBOOK].files)


def refuse(*words, workdir, **options):
    """Encodes, and expects a message with these words."""
    with pytest.raises(UserError) as error:
        run(CODEBOOK, workdir, **options)
    for word in words:
        assert str(word) in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"train": images()["train"][::-1]}, {"test": images()["test"][:-1]}, None]
)
def test_tokens_of_another_model_or_other_images_are_left_alone(changes, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    before = contents(workdir / "tokens")
    options = {"data": ArrayDataset(**{**images(), **(changes or {})})}
    if changes is None:
        run_encode.save_checkpoint(CODEBOOK, tmp_path / "other", seed=0)
        options["checkpoint"] = tmp_path / "other"
    words = workdir / "tokens", "another model or data set", "move it away"
    refuse(*words, workdir=workdir, **options)
    assert_same_files(workdir / "tokens", before)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_directory_of_something_else_is_left_alone(content, all_encoded, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/job.json").write_text(content)
    refuse(tmp_path, "away", workdir=tmp_path, checkpoint=all_encoded[CODEBOOK].workdir)
    assert contents(tmp_path / "tokens") == {"job.json": content.encode()}


def test_without_a_matching_checkpoint_no_workdir_is_made(all_encoded, tmp_path):
    refuse("no checkpoint in", tmp_path / "mistyped", workdir=tmp_path / "mistyped")
    trained = all_encoded[CODEBOOK].workdir
    words = trained / "checkpoints/1", "of the data set 'tiny', not of 'mnist'"
    refuse(*words, workdir=tmp_path, checkpoint=trained, dataset=DatasetConfig("mnist"))
    assert not list(tmp_path.iterdir())


FIRST = "tokens/tiny_tokens-train.array_record-00000-of-00009"


@pytest.mark.parametrize(
    "name",
    [
        *("tokens/vocabulary.npy", FIRST, f"{FIRST}.json"),
        *("tokens/dataset_info.json", "tokens/features.json", "tokens", ""),
    ],
)
def test_what_cannot_be_written_is_one_line(name, all_encoded, tmp_path):
    """A directory is in the place of a file, or a file in that of a directory."""
    in_the_way = tmp_path / "run" / name
    if "." in name:
        in_the_way.mkdir(parents=True)
    else:
        in_the_way.parent.mkdir(exist_ok=True)
        in_the_way.write_text("in the way")
    words = tmp_path / "run" / name.partition("/")[0], "cannot be written"
    refuse(*words, workdir=tmp_path / "run", checkpoint=all_encoded[CODEBOOK].workdir)
    assert in_the_way.is_dir() or in_the_way.read_text() == "in the way"


def test_a_checkpoint_may_be_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ("--config=configs/fashion_mnist.py:vq", "--workdir=/nowhere", "--checkpoint=/other")
    outcome, _ = fuzz_targets.parse([*flags, "--mode=encode"])
    assert outcome != "refused"


@pytest.mark.long  # 70,000 images
@needs_files
def test_main_encodes_the_real_data(tmp_path):
    command = [
        *(sys.executable, "main.py", "--config=configs/fashion_mnist.py:sparse_lattice"),
        *(f"--workdir={tmp_path}", "--config.num_train_steps=10"),
        "--config.quantizer.codebook_size=16_777_216",  # a fine lattice: some hundred codes
        *("--config.model.hidden_dims=(8,)", "--config.model.latent_dim=8"),
        "--config.model.num_residual_blocks=0",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    for mode in ("train", "encode"):
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run([*command, f"--mode={mode}"], timeout=500, check=False, **options)
        assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/tokens has 13,720,000 tokens of " in result.stderr

    data, model = input_pipeline.load("fashion_mnist"), load_pretrained(tmp_path)
    vocabulary = np.load(tmp_path / "tokens/vocabulary.npy")
    builder = tfds.builder_from_directory(tmp_path / "tokens")
    for split, count in (("train", 55_000), ("validation", 5_000), ("test", 10_000)):
        source, last = builder.as_data_source(split), range(count - 50, count)
        assert len(source) == count
        tokens = np.stack([source[i]["tokens"] for i in last])
        assert len(np.unique(tokens)) > 10
        codes = np.asarray(model.encode(data.resident(split)[last]))
        # Few codes differ: the other process has compiled with other options, and rare codes have
        # become others.
        assert np.mean(np.all(vocabulary[tokens] == codes, axis=-1)) > 0.999
