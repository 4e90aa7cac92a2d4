"""A folder of images as a data set, against Pillow and NumPy."""

import io
import json
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the data set is prepared with it")

import tensorflow as tf
from PIL import Image

import input_pipeline
from input_pipeline import image_folder
from llvq.data import IndexBatch
from llvq.data.image_files import read_image
from llvq.errors import UserError
from tests.image_data import read_images

SHAPE = (16, 16, 3)


def pixels(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        options["lossless"] = True
    Image.fromarray(array).save(path, **options)


def load(tmp_path, folder=None, shape=SHAPE, **options):
    options = {"fit": "tiles", "flip": False, "convert": False, "skip_damaged": False} | options
    return input_pipeline.load(
        "image_folder",
        str(tmp_path / "data"),
        str(folder or tmp_path / "photos"),
        image_shape=shape,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    """Three splits, nested, in three formats and of several sizes."""
    root = tmp_path / "photos"
    write(root / "train/b.png", pixels(35, 50, 3, seed=1))
    write(root / "train/deep/er/a.webp", pixels(16, 16, 3, seed=2))
    write(root / "train/too_small.png", pixels(15, 100, 3, seed=3))
    write(root / "validation/grey.PNG", pixels(20, 33, seed=4))
    write(root / "test/c.png", pixels(40, 16, 3, seed=5))
    write(root / "beside.png", pixels(16, 16, 3))
    write(root / "train/.hidden/x.png", pixels(16, 16, 3))
    (root / "train/notes.txt").write_text("no image")
    return root


def tiles(array, size=16):
    return [
        array[top : top + size, left : left + size]
        for top in range(0, array.shape[0] - size + 1, size)
        for left in range(0, array.shape[1] - size + 1, size)
    ]


def test_tiles_of_sub_folders(folder, tmp_path):
    data = load(tmp_path)
    train = [*tiles(pixels(35, 50, 3, seed=1)), pixels(16, 16, 3, seed=2)]
    grey = np.repeat(pixels(20, 33, seed=4)[..., None], 3, axis=-1)
    expected = {"train": train, "validation": tiles(grey), "test": tiles(pixels(40, 16, 3, seed=5))}
    assert dict(data.num_images) == {"train": 7, "validation": 2, "test": 2}
    assert data.image_shape == SHAPE
    for split, images in expected.items():
        np.testing.assert_array_equal(read_images(data, split), np.stack(images))
    # Once prepared, it is opened without the folder.
    shutil.rmtree(folder)
    np.testing.assert_array_equal(read_images(load(tmp_path), "train"), np.stack(train))


def test_a_fingerprint_tells_folders_apart(folder, tmp_path):
    first = load(tmp_path).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load(tmp_path, copy).fingerprint == first
    (copy / "train/b.png").rename(copy / "train/bb.png")  # the same number of images
    shutil.rmtree(tmp_path / "data")
    assert dict(load(tmp_path, copy).num_images) == dict(load(tmp_path).num_images)
    assert load(tmp_path, copy).fingerprint != load(tmp_path).fingerprint


def test_images_are_scaled_and_cropped(tmp_path):
    smooth = np.add.outer(np.linspace(0, 120, 64), np.linspace(0, 120, 96))
    image = np.repeat(smooth[..., None], 3, axis=-1).astype(np.uint8)
    for split in ("train", "validation"):
        write(tmp_path / "photos" / split / "x.png", image)
    found = read_images(load(tmp_path, fit="resize"), "train")[0]
    # 64×96 becomes 16×24, of which columns 4 to 20 stay: means of 4×4 pixels, which Lanczos gives
    # up to its ringing at the edges, and rounding.
    means = image.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))[:, 4:20]
    np.testing.assert_allclose(found, means, atol=2.5)


def test_flips_are_a_choice(folder, tmp_path):
    for flip in (False, True):
        data = load(tmp_path, flip=flip)
        batch = IndexBatch(np.array([6]), np.array([True]), np.array([True]))
        ((_, images),) = data.batches("train", [batch])
        expected = pixels(16, 16, 3, seed=2)
        np.testing.assert_array_equal(images[0], expected[:, ::-1] if flip else expected)


def test_without_sub_folders_a_files_path_decides(tmp_path):
    root = tmp_path / "photos"
    for i in range(120):
        write(root / f"{i:03d}.png", np.full((16, 32, 3), i, np.uint8))
    before = load(tmp_path)
    members = {split: split_members(before, split) for split in before.num_images}
    assert set(members) == {"train", "validation", "test"}
    assert sum(map(len, members.values())) == 120  # both tiles of a file are in one split
    assert 90 < len(members["train"]) < 119
    for i in range(120, 140):
        write(root / f"{i:03d}.png", np.full((16, 32, 3), i, np.uint8))
    with pytest.raises(UserError, match=r"photos has changed .*\(20 files added, 0 removed, 0 ch"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "data")
    after = load(tmp_path)
    for split, some in members.items():
        assert some <= split_members(after, split)


def split_members(data, split):
    return set(read_images(data, split)[:, 0, 0, 0].tolist())


def test_train_without_validation_gives_some_of_its_files(tmp_path):
    for i in range(120):
        write(tmp_path / f"photos/train/{i:03d}.png", np.full((16, 16, 3), i, np.uint8))
    data = load(tmp_path)
    assert set(data.num_images) == {"train", "validation"}
    assert not split_members(data, "train") & split_members(data, "validation")


def test_exif_orientation(tmp_path):
    image = pixels(20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    write(tmp_path / "x.png", image, exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", 3), np.rot90(image, -1))


def test_what_would_be_lost_is_refused_or_converted(tmp_path):
    rgba, grey16 = pixels(16, 16, 4), np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    write(tmp_path / "alpha.png", rgba)
    (tmp_path / "16.png").write_bytes(tf.io.encode_png(grey16[..., None]).numpy())
    rgb16 = np.repeat(grey16[..., None], 3, axis=-1)
    (tmp_path / "rgb16.png").write_bytes(tf.io.encode_png(rgb16).numpy())
    for name, reason in (("alpha", "transparency"), ("16", "16 bits"), ("rgb16", "16 bits")):
        with pytest.raises(UserError, match=rf"{name}\.png has {reason}"):
            read_image(tmp_path / f"{name}.png", 3)
    share = rgba[..., 3:] / 255
    np.testing.assert_allclose(
        read_image(tmp_path / "alpha.png", 3, convert=True),
        share * rgba[..., :3] + (1 - share) * 255,
        atol=1,  # rounding
    )
    for name in ("16", "rgb16"):
        found = read_image(tmp_path / f"{name}.png", 3, convert=True)
        np.testing.assert_array_equal(found, rgb16 // 257)


def test_all_unusable_files_are_named(folder, tmp_path, caplog):
    (folder / "train/broken.png").write_bytes(b"no image")
    whole = io.BytesIO()
    Image.fromarray(pixels(64, 64, 3)).save(whole, "JPEG")
    (folder / "test/cut.jpg").write_bytes(whole.getvalue()[:900])
    write(folder / "validation/alpha.png", pixels(16, 16, 4))
    with pytest.raises(UserError, match=r"3 of 8 files of .*photos cannot be used"):
        load(tmp_path)
    for name in ("broken.png", "cut.jpg", "alpha.png"):
        assert name in caplog.text
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    data = load(tmp_path, skip_damaged=True)
    assert dict(data.num_images) == {"train": 7, "validation": 2, "test": 2}
    with pytest.raises(UserError, match=r"3 of 8 files of .*photos cannot be used"):
        load(tmp_path)  # it has not forgotten


def test_preparing_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "_IMAGES_PER_SHARD", 2)
    expected = {split: read_images(load(tmp_path), split) for split in ("train", "test")}
    (directory,) = (tmp_path / "data").glob("*/1.0.0")
    (directory / "dataset_info.json").unlink()
    shard = sorted(directory.glob("*train*"))[1]
    shard.unlink()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("*array_record*")}
    data = load(tmp_path)
    for split, images in expected.items():
        np.testing.assert_array_equal(read_images(data, split), images)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    names = json.loads((directory / "sources.json").read_text())
    assert names[0][0] == "test/c.png"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "test/c.png").unlink(), "0 files added, 1 removed, 0 changed"),
        (
            lambda folder: write(folder / "test/c.png", pixels(16, 17, 3)),
            "0 files added, 0 removed, 1 changed",
        ),
    ],
)
def test_a_changed_folder_is_noticed(change, words, folder, tmp_path):
    load(tmp_path)
    change(folder)
    with pytest.raises(UserError, match=rf"{words}\): delete .*data.* to have it prepared again"):
        load(tmp_path)
    load(tmp_path, fit="resize")  # which is another data set


def test_a_file_that_changes_meanwhile_is_noticed(folder, tmp_path, monkeypatch):
    reads = []

    def read_and_change(path, *arguments, **options):
        array = read_image(path, *arguments, **options)
        reads.append(path.name)
        if reads.count("b.png") == 2:  # read for the second time to write it
            write(folder / "train/b.png", pixels(64, 64, 3))
        return array

    monkeypatch.setattr(image_folder, "read_image", read_and_change)
    with pytest.raises(
        UserError, match=r"b\.png has changed while the folder was prepared: delete .*data"
    ):
        load(tmp_path)
    with pytest.raises(UserError, match=r"1 changed\): delete .*data"):
        load(tmp_path)


def test_a_name_in_any_encoding(folder, tmp_path):
    shutil.copy(folder / "train/b.png", os.fsencode(folder) + b"/train/caf\xe9.png")
    write(folder / "train/\N{SNOWMAN}.png", pixels(16, 16, 3))
    assert load(tmp_path).num_images["train"] == 6 + 6 + 1 + 1


@pytest.mark.long  # 20 s
def test_many_files(tmp_path):
    """10,000 files, three of them damaged; what a file costs in memory once it is prepared."""
    write(tmp_path / "photos/0.png", pixels(16, 16, 3))
    for i in range(1, 10_000):
        (tmp_path / f"photos/{i}.png").hardlink_to(tmp_path / "photos/0.png")
    for i in (7, 77, 777):
        (tmp_path / f"photos/{i}.png").unlink()
        (tmp_path / f"photos/{i}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^3 of 10000 files of .*photos cannot be used"):
        load(tmp_path)
    load(tmp_path, skip_damaged=True)
    tracemalloc.start()
    data = load(tmp_path, skip_damaged=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(data.num_images.values()) == 9_997
    assert peak < 10_000 * 1_000  # a million files: 1 GB


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"manual_dir=.*nowhere: there is no such folder"):
        load(tmp_path, tmp_path / "nowhere")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"manual_dir=.*file: there is no such folder"):
        load(tmp_path, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        load(tmp_path, tmp_path / "empty")
    write(tmp_path / "one/x.png", pixels(16, 16, 3))
    with pytest.raises(UserError, match="too few images"):
        load(tmp_path, tmp_path / "one")
    (tmp_path / "one/link.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1 of 2 files of .*one cannot be used"):
        load(tmp_path, tmp_path / "one")
    (tmp_path / "one/link.png").unlink()
    (tmp_path / "one/circle").symlink_to(tmp_path / "one")
    with pytest.raises(UserError, match=r"one/circle is .*one again: remove the link"):
        load(tmp_path, tmp_path / "one")
    (tmp_path / "one/circle").unlink()
    for split in ("train", "validation"):
        write(tmp_path / "one" / split / "x.png", pixels(16, 16, 3))
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written .*--config\.dataset\.data_dir"):
        load(tmp_path, tmp_path / "one")
    with pytest.raises(UserError, match="1 or 3 channels"):
        load(tmp_path, shape=(16, 16, 2))
    with pytest.raises(UserError, match=r"name the folder with --config\.dataset\.manual_dir"):
        input_pipeline.load("image_folder", image_shape=SHAPE, fit="tiles", flip=False)
    with pytest.raises(UserError, match=r"config\.dataset\.fit='tiles': celeba has no such option"):
        input_pipeline.load("celeba", fit="tiles")


def test_files_without_a_tile_are_counted(folder, tmp_path, caplog):
    write(folder / "train/small.png", pixels(15, 40, 3))
    load(tmp_path)
    assert re.search(r"2 of 6 files of .* smaller than a tile .* train/small.png", caplog.text)
