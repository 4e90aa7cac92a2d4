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
from llvq.errors import UserError
from tests import image_data

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
    builder = tfds.builder_from_directory(finished)
    assert str(builder.info.full_name) == "small/1.0.0"
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == NUM_IMAGES
    example = builder.as_data_source("validation")[1]
    np.testing.assert_array_equal(example["image"], np.asarray(image(11)))
    assert example["name"] == b"11.png"


def test_every_shard_has_its_checksum(prepared):
    checksums = json.loads((prepared / "checksums.json").read_text())
    assert {path.name for path in shards(prepared)} == set(checksums)
    for path in shards(prepared):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == checksums[path.name]["sha256"]


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


def test_too_small_a_disk_is_one_line_at_once(tmp_path):
    with pytest.raises(UserError, match=r"needs 1000000\.0 GB of disk and .* are free.*data_"):
        run(tmp_path, num_bytes=10**15)
    assert not shards(tmp_path)


def test_an_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^[^\n]*file/x cannot be written [^\n]*data_dir$"):
        run(tmp_path / "file/x")


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

    def counting(split, positions):
        asked.append((split, positions.start))
        return read(split, positions)

    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        try:
            assert process.stdout.readline() == b"waiting\n"
            first = tmp_path / "small-train.array_record-00000-of-00003"
            before = first.stat()
            result = pool.submit(run, tmp_path, counting)
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

    def slow(split, positions):
        reading.set()
        assert go_on.wait(60)
        return read(split, positions)

    def never(split, positions):
        pytest.fail("read although another one prepares")

    with futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path, slow)
        assert reading.wait(60)
        second = pool.submit(run, tmp_path, never)
        time.sleep(0.5)
        assert not second.done()
        go_on.set()
        assert_complete(first.result(60))
        assert_complete(second.result(60))


@pytest.mark.parametrize("lost", ["dataset_info.json", "features.json"])
def test_without_metadata_it_is_not_used_but_completed(lost, prepared):
    (prepared / lost).unlink()
    assert not prepare.is_prepared(epath.Path(prepared))
    assert_complete(run(prepared, lambda split, positions: pytest.fail("nothing is missing")))


def test_a_torn_metadata_file_is_one_line(prepared):
    (prepared / "dataset_info.json").write_text("")
    with pytest.raises(UserError, match=r"dataset_info\.json cannot be read: delete it"):
        prepare.open_prepared(epath.Path(prepared), NUM_IMAGES)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "of another split"])
def test_a_missing_or_incomplete_shard_is_named_and_can_be_rebuilt(damage, prepared):
    shard = prepared / "small-train.array_record-00001-of-00003"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:70_000])
    elif damage == "empty":
        shard.write_bytes(b"")
    else:
        shard.write_bytes((prepared / "small-validation.array_record-00000-of-00001").read_bytes())
    with pytest.raises(UserError, match=rf"^{shard} (is missing|has [03] records, not 4): [^\n]*$"):
        prepare.open_prepared(epath.Path(prepared), NUM_IMAGES)
    (prepared / "dataset_info.json").unlink()  # as the message says
    assert_complete(run(prepared))


def test_a_directory_in_a_shards_place_is_one_line(prepared):
    (prepared / "dataset_info.json").unlink()
    shard = prepared / "small-train.array_record-00001-of-00003"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=rf"^{prepared} cannot be written [^\n]*{shard}[^\n]*$"):
        run(prepared)


OTHER_CHECKSUMS = ["[]", "3", '{"small-train.array_record-00001-of-00003": 3}']


@pytest.mark.parametrize("content", ["", "{", *OTHER_CHECKSUMS])
def test_checksums_torn_by_a_power_cut_are_made_again(content, prepared):
    (prepared / "checksums.json").write_text(content)
    (prepared / "dataset_info.json").unlink()
    assert_complete(run(prepared))


def test_another_number_of_images_is_refused(prepared):
    with pytest.raises(UserError, match=r"has 3 images in split 'validation', not 4"):
        prepare.open_prepared(epath.Path(prepared), {"train": 10, "validation": 4})


DAMAGED = {
    "truncated": (image_data.encode(image(5), "PNG")[:-20], "damaged"),
    "empty": (b"", "damaged"),
    "not an image": (b"<html>404</html>", "damaged"),
    "wrong size": (image_data.encode(image_data.picture(5, 5, 6), "PNG"), r"\(5, 6, 3\)"),
    "greyscale": (image_data.encode(image(5).convert("L"), "PNG"), r"\(6, 5, 1\)"),
    "with alpha": (image_data.encode(image(5).convert("RGBA"), "PNG"), r"\(6, 5, 4\)"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_wrong_image_is_named_and_what_was_finished_stays(kind, tmp_path):
    encoded, words = DAMAGED[kind]

    def with_damage(split, positions):
        for name, content in read(split, positions):
            yield name, encoded if name == "5.png" else content

    with pytest.raises(UserError, match=rf"^5\.png [^\n]*{words}[^\n]*$"):
        run(tmp_path, with_damage)
    assert not prepare.is_prepared(epath.Path(tmp_path))
    assert_complete(run(tmp_path))


def test_a_record_damaged_later_is_one_line_at_run_time(prepared):
    sources = prepare.open_prepared(epath.Path(prepared), NUM_IMAGES)
    shard = prepared / "small-train.array_record-00001-of-00003"
    content = shard.read_bytes()
    place = content.index(image_data.encode(image(6), "PNG")[-50:])
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    batches = Pipeline(sources, SHAPE, decode_any).batches("train", order.evaluation_batches(10, 4))
    np.testing.assert_array_equal(next(batches)[0].index, [0, 1, 2, 3])
    with pytest.raises(UserError, match=rf"^record 2 of {shard}: image 6 of split 'train' [^\n]*$"):
        next(batches)


def test_an_image_that_does_not_decode_is_one_line_at_run_time(tmp_path):
    def with_damage(split, positions):
        for name, content in read(split, positions):
            yield name, content[:30] if name == "5.png" else content

    sources = run(tmp_path, with_damage, decode=lambda _: tf.zeros(SHAPE, tf.uint8))
    data = Pipeline(sources, SHAPE, decode_any)
    batches = data.batches("train", order.evaluation_batches(10, 3))
    next(batches)
    shard = tmp_path / "small-train.array_record-00001-of-00003"
    words = rf"^record 1 of {shard}: image 5 of split 'train' cannot be read: [^\n{{]*$"
    with pytest.raises(UserError, match=words):
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
