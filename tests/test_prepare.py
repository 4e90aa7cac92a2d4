"""Writing, resuming and reading a directory of checked ArrayRecord shards."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from input_pipeline import prepare
from input_pipeline.pipeline import Pipeline
from llvq.data import order
from tests import image_data
from tests.image_data import refused

SHAPE = (6, 5, 3)
NUM_IMAGES = {"train": 10, "validation": 3}
FIRST = {"train": 0, "validation": 10}


def image(number):
    return image_data.picture(number, *SHAPE[:2])


def read(split, positions):
    for position in positions:
        number = FIRST[split] + position
        yield f"{number}.png", image_data.encode(image(number), "PNG")


def decode_any(encoded):
    return tf.io.decode_image(encoded, expand_animations=False)


def replacing(name, encoded):
    """Reads the same but for one image."""

    def read_with_change(split, positions):
        for other, content in read(split, positions):
            yield other, encoded if other == name else content

    return read_with_change


def noting(asked):
    """Reads the same; adds each shard's split and first position to a list."""

    def read_and_note(split, positions):
        asked.append((split, positions.start))
        return read(split, positions)

    return read_and_note


def run(directory, read=read, **changes):
    arguments = {
        "image_shape": SHAPE,
        "images_per_shard": 4,
        "num_bytes": 2000,
        "seconds_per_image": 60.0,
        "about": {"description": "Small images.", "homepage": "", "license": "MIT"},
        **changes,
    }
    directory = epath.Path(directory)
    decode = arguments.pop("decode", decode_any)
    prepare.prepare(directory, "small", NUM_IMAGES, read, decode, **arguments)
    return prepare.open_prepared(directory, NUM_IMAGES)


def assert_complete(sources):
    data = Pipeline(sources, SHAPE, decode_any)
    for split, count in NUM_IMAGES.items():
        desired = [np.asarray(image(FIRST[split] + i)) for i in range(count)]
        np.testing.assert_array_equal(image_data.read_images(data, split), desired)


def shards(directory):
    return sorted(path for path in directory.iterdir() if "array_record" in path.name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete directory, to be read only."""
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


@pytest.fixture
def prepared(finished, tmp_path):
    """A copy of a complete directory."""
    return shutil.copytree(finished, tmp_path / "prepared")


def test_records_are_what_was_read_and_tfds_reads_them(finished):
    assert_complete(prepare.open_prepared(epath.Path(finished), NUM_IMAGES))
    assert [path.name for path in shards(finished)] == [
        *(f"small-train.array_record-0000{i}-of-00003" for i in range(3)),
        "small-validation.array_record-00000-of-00001",
    ]
    checksums = json.loads((finished / "checksums.json").read_text())
    assert checksums == {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in shards(finished)
    }
    builder = tfds.builder_from_directory(finished)
    assert str(builder.info.full_name) == "small/1.0.0"
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == NUM_IMAGES
    example = builder.as_data_source("validation")[1]
    np.testing.assert_array_equal(example["image"], np.asarray(image(11)))
    assert example["name"] == b"11.png"


def test_disk_and_time_are_stated_before_it_starts(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    said = []

    def late_read(split, positions):
        said.append(caplog.text)
        return read(split, positions)

    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        run(tmp_path, late_read, num_bytes=3_000_000_000, scratch_bytes=1_000_000_000)
    assert f"Preparing {tmp_path}: 13 images, 4.0 GB of disk (" in said[0]
    assert "about 6 min" in said[0]  # 13 images of a minute each on 2 cores, rounded to even


def test_what_cannot_be_written_is_one_line(tmp_path):
    with refused(r"needs 1000000\.0 GB of disk and .* are free.*data_dir$"):
        run(tmp_path, num_bytes=10**15)
    assert not shards(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with refused(r"file/x cannot be written .*data_dir$"):
        run(tmp_path / "file/x")
    shard = tmp_path / "small-train.array_record-00001-of-00003"
    shard.mkdir()
    with refused(rf"^{tmp_path} cannot be written .*{shard}"):
        run(tmp_path)


CHILD = """
import sys, time
from tests import test_prepare

def read(split, positions):
    for position, image in zip(positions, test_prepare.read(split, positions)):
        if (split, position) == ("train", 6):  # in the middle of the second shard
            print("waiting", flush=True)
            time.sleep(600)
        yield image

test_prepare.run(sys.argv[1], read)
"""


@pytest.mark.slow
def test_after_a_kill_another_process_keeps_finished_shards_and_writes_the_rest(tmp_path):
    """The other process has been waiting for the killed one."""
    asked = []
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        try:
            assert process.stdout.readline() == b"waiting\n"
            first = tmp_path / "small-train.array_record-00000-of-00003"
            before = first.stat()
            result = pool.submit(run, tmp_path, noting(asked))
            time.sleep(1)
            assert not asked
            assert not prepare.is_prepared(epath.Path(tmp_path))
        finally:
            process.kill()
        assert_complete(result.result(60))
    assert asked == [("train", 4), ("train", 8), ("validation", 0)]
    after = first.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert not list(tmp_path.glob("*.unfinished"))


def test_two_at_once_prepare_once(tmp_path):
    """The second waits for the first and finds everything done."""
    reading, go_on = threading.Event(), threading.Event()

    asked = []

    def slow(split, positions):
        reading.set()
        assert go_on.wait(60)
        return read(split, positions)

    with futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path, slow)
        assert reading.wait(60)
        second = pool.submit(run, tmp_path, noting(asked))
        time.sleep(0.5)
        assert not second.done()
        go_on.set()
        assert_complete(first.result(60))
        assert_complete(second.result(60))
    assert not asked


INFO, CHECKSUMS, SHARD = (
    "dataset_info.json",
    "checksums.json",
    "small-train.array_record-00001-of-00003",
)


def containing(content):
    return lambda path: path.write_bytes(content)


def flip_a_bit(path):
    path.write_bytes(image_data.flip(path.read_bytes(), path.stat().st_size // 2))


def copy_another_splits(path):
    shutil.copy(path.with_name("small-validation.array_record-00000-of-00001"), path)


# What happens to a file of a complete directory, and what opening it says if it does not see for
# itself that the directory is incomplete.
DAMAGED = {
    "no info": (INFO, Path.unlink, None),
    "torn info": (INFO, containing(b""), f"{INFO} cannot be read: delete it"),
    "no features": ("features.json", Path.unlink, None),
    "no shard": (SHARD, Path.unlink, f"{SHARD} is missing: "),
    "truncated shard": (SHARD, lambda path: os.truncate(path, 70_000), "has 0 records, not 4: "),
    "empty shard": (SHARD, containing(b""), f"{SHARD} has 0 records, not 4: "),
    "short shard": (SHARD, copy_another_splits, f"{SHARD} has 3 records, not 4: "),
    "flipped bit": (SHARD, flip_a_bit, None),
    # Of a power cut.
    "torn checksums": (CHECKSUMS, containing(b""), None),
    "half of the checksums": (CHECKSUMS, lambda path: os.truncate(path, 20), None),
    "a list of checksums": (CHECKSUMS, containing(b"[]"), None),
    "no checksum in it": (CHECKSUMS, containing(f'{{"{SHARD}": 3}}'.encode()), None),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_directory_is_refused_or_completed(kind, prepared):
    name, damage, words = DAMAGED[kind]
    damage(prepared / name)
    if words:
        with refused(f"^{prepared}/.*{words}"):
            prepare.open_prepared(epath.Path(prepared), NUM_IMAGES)
    if kind != "no features":
        (prepared / INFO).unlink(missing_ok=True)  # as the message says
    assert not prepare.is_prepared(epath.Path(prepared))
    asked = []
    assert_complete(run(prepared, noting(asked)))
    every_shard = [("train", 0), ("train", 4), ("train", 8), ("validation", 0)]
    assert asked == {SHARD: [("train", 4)], CHECKSUMS: every_shard}.get(name, [])


def test_another_number_of_images_is_refused(finished):
    with refused("has 3 images in split 'validation', not 4"):
        prepare.open_prepared(epath.Path(finished), {"train": 10, "validation": 4})


WRONG_IMAGES = {
    "truncated": (image_data.encode(image(5), "PNG")[:-20], "damaged"),
    "empty": (b"", "damaged"),
    "not an image": (b"<html>404</html>", "damaged"),
    "wrong size": (image_data.encode(image_data.picture(5, 5, 6), "PNG"), r"\(5, 6, 3\)"),
    "greyscale": (image_data.encode(image(5).convert("L"), "PNG"), r"\(6, 5, 1\)"),
    "with alpha": (image_data.encode(image(5).convert("RGBA"), "PNG"), r"\(6, 5, 4\)"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_a_wrong_image_is_named_and_what_was_finished_stays(kind, tmp_path):
    encoded, words = WRONG_IMAGES[kind]

    with refused(rf"^5\.png .*{words}"):
        run(tmp_path, replacing("5.png", encoded))
    assert not prepare.is_prepared(epath.Path(tmp_path))
    assert_complete(run(tmp_path))


@pytest.mark.parametrize("kind", ["record", "image"])
def test_what_is_damaged_later_is_one_line_at_run_time(kind, tmp_path):
    decode = decode_any if kind == "record" else lambda _: tf.zeros(SHAPE, tf.uint8)
    encoded = image_data.encode(image(6), "PNG")
    content = encoded if kind == "record" else encoded[:30]
    sources = run(tmp_path, replacing("6.png", content), decode=decode)
    shard = tmp_path / "small-train.array_record-00001-of-00003"
    if kind == "record":
        place = shard.read_bytes().index(encoded[-50:])
        shard.write_bytes(image_data.flip(shard.read_bytes(), place))
    batches = Pipeline(sources, SHAPE, decode_any).batches("train", order.evaluation_batches(10, 4))
    np.testing.assert_array_equal(next(batches)[0].index, [0, 1, 2, 3])
    with refused(rf"^record 2 of {shard}: image 6 of split 'train' cannot be read: [^{{]*$"):
        next(batches)


def test_training_flips_as_the_index_batches_say_and_evaluation_never(finished):
    sources = prepare.open_prepared(epath.Path(finished), NUM_IMAGES)
    images = np.stack([np.asarray(image(i)) for i in range(10)])
    flips = []
    batches = Pipeline(sources, SHAPE, decode_any).batches(
        "train", order.training_batches(10, 4, seed=1)
    )
    for _, (batch, actual) in zip(range(5), batches, strict=False):
        desired = images[batch.index]
        desired[batch.flip] = desired[batch.flip][:, :, ::-1]
        flips += batch.flip.tolist()
        np.testing.assert_array_equal(actual, desired)
    assert set(flips) == {True, False}
