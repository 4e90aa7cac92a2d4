"""FFHQ-1024, from small copies of the official release and from a hub on the loopback device.

The images are small; everything else is as in the real ones: file names, groups, encodings.
"""

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import huggingface_hub.constants
import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

from absl import logging

from configs import ffhq1024 as ffhq1024_config
from input_pipeline import ffhq1024
from llvq.errors import UserError
from tests import image_data
from tests.image_data import encode, ffhq_image, picture, read_images, webp

NUM_IMAGES = {"train": 12, "validation": 4}
PER_GROUP = 4
TOTAL = sum(NUM_IMAGES.values())
SHAPE = (image_data.PIXELS, image_data.PIXELS, 3)


def load(data_dir, manual_dir=""):
    return ffhq1024.load(
        str(data_dir),
        str(manual_dir),
        num_images=NUM_IMAGES,
        images_per_group=PER_GROUP,
        image_shape=SHAPE,
    )


def assert_complete(data):
    assert data.num_images == NUM_IMAGES
    train = [np.asarray(ffhq_image(i)) for i in range(12)]
    validation = [np.asarray(ffhq_image(i)) for i in range(12, 16)]
    np.testing.assert_array_equal(read_images(data, "train"), train)
    np.testing.assert_array_equal(read_images(data, "validation"), validation)


def official_files(changes=None):
    """(path, content) of every image of the release; `changes` has others, or None, by index."""
    for index in range(TOTAL):
        content = (changes or {}).get(index, encode(ffhq_image(index), "PNG"))
        if content is not None:
            yield f"images1024x1024/{index - index % 4:05d}/{index:05d}.png", content


def write_folder(directory, changes=None):
    for name, content in official_files(changes):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def write_zip(directory, changes=None):
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / "images1024x1024.zip", "w") as file:
        for name, content in official_files(changes):
            file.writestr(name, content)


def members(start, changes=None):
    """(name, content) of a tar's members; `changes` has others, or None, by index."""
    for index in range(start, start + PER_GROUP):
        content = (changes or {}).get(index, webp(ffhq_image(index)))
        if content is not None:
            yield f"{index:05d}.webp", content


def png_of_16_bits():
    """16×16 zeros in RGB, which Pillow does not write so deep."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 16 * 6))))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the data set; the client of this process and of its children asks it."""
    hub = image_data.Hub(ffhq1024._HUB_DATASET, ffhq1024._HUB_REVISION)
    for start in range(0, TOTAL, PER_GROUP):
        hub.files[f"{start:05d}.tar"] = image_data.tar_bytes(members(start))
    with image_data.serve(hub):
        point_at(hub.url, monkeypatch)
        yield hub


def point_at(url, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", url)  # which the client reads when it is imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_the_numbers_are_the_official_ones():
    indices = ffhq1024._indices(ffhq1024.NUM_IMAGES)
    assert indices == {"train": range(60_000), "validation": range(60_000, 70_000)}
    assert ffhq1024._path(69_999, ffhq1024.IMAGES_PER_GROUP) == "69000/69999.png"
    assert ffhq1024._HUB_REVISION == "d74f1f1f59e3bbe975bee29872b9bef827314577"
    assert ffhq1024_config.get_config("vq").model.image_shape == ffhq1024.IMAGE_SHAPE


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_official_release(write, tmp_path):
    write(tmp_path / "manual")
    assert_complete(load(tmp_path / "data", tmp_path / "manual"))
    assert_complete(load(tmp_path / "data"))  # prepared; the release is not needed any more


def test_release_where_tfds_looks_for_manual_files(tmp_path):
    write_folder(tmp_path / "downloads/manual/ffhq1024")
    assert_complete(load(tmp_path))


def test_hub_one_tar_at_a_time(hub, tmp_path, caplog):
    download = tmp_path / "ffhq1024/1.0.0/download"
    found = []
    hub.on_download = lambda name: found.append(list(download.glob("*.tar")))
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        assert_complete(load(tmp_path))
    assert hub.downloads == ["00000.tar", "00004.tar", "00008.tar", "00012.tar"]
    assert found == [[], [], [], []]  # whenever a tar is fetched, those before it are gone
    assert not download.exists()
    assert "16 images" in caplog.text
    assert_complete(load(tmp_path))
    assert len(hub.downloads) == 4


def test_bytes_are_kept_as_they_are(hub, tmp_path):
    load(tmp_path)
    shard = tmp_path / "ffhq1024/1.0.0/ffhq1024-train.array_record-00002-of-00003"
    assert webp(ffhq_image(9)) in shard.read_bytes()


CHILD = """
import os, sys
os.environ["NO_GCE_CHECK"] = "true"
from input_pipeline import ffhq1024
ffhq1024.load(sys.argv[1], num_images={"train": 12, "validation": 4}, images_per_group=4,
              image_shape=(16, 16, 3))
"""


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_downloaded(hub, tmp_path):
    """A process that HF_ENDPOINT points at the hub is killed while it fetches the third tar."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)])

    def kill(name):
        if name == "00008.tar":
            os.kill(child.pid, signal.SIGKILL)
            child.wait()

    hub.on_download = kill
    assert child.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "ffhq1024/1.0.0/dataset_info.json").exists()
    hub.on_download = lambda name: None
    hub.downloads.clear()
    assert_complete(load(tmp_path))
    assert hub.downloads == ["00008.tar", "00012.tar"]


def test_a_release_completes_what_the_hub_began(hub, tmp_path):
    del hub.files["00012.tar"]
    hub.files["00012.tar"] = b"not a tar, but of this checksum"
    with pytest.raises(UserError, match=r"00012\.tar cannot be read"):
        load(tmp_path / "data")
    write_folder(tmp_path / "manual")
    assert_complete(load(tmp_path / "data", tmp_path / "manual"))


def published(changes=None):
    """The release's metadata: of each image, among much else, the MD5 of its pixels."""
    entries = {}
    for index in range(TOTAL):
        md5 = hashlib.md5(np.array((changes or {}).get(index, ffhq_image(index)))).hexdigest()
        entries[str(index)] = {
            "category": "training" if index < 12 else "validation",
            "metadata": {"author": "image", "pixel_md5": "of nothing"},
            "image": {"file_url": "https://…", "pixel_size": [16, 16], "pixel_md5": md5},
            "thumbnail128x128": {"pixel_size": [128, 128], "pixel_md5": "0" * 32},
        }
    return json.dumps(entries)


def test_pixels_are_compared_with_the_published_md5s(hub, tmp_path):
    manual = tmp_path / "downloads/manual/ffhq1024"
    manual.mkdir(parents=True)
    metadata = manual / "ffhq-dataset-v2.json"
    metadata.write_text(published({6: ffhq_image(5)}))
    with pytest.raises(
        UserError, match=r"^00006\.webp of 00004\.tar has other pixels than published"
    ):
        load(tmp_path)
    metadata.write_text(published())
    assert_complete(load(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"0": {"image": {"pixel_md5": "12"}}}'])
def test_damaged_metadata_is_named(content, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "ffhq-dataset-v2.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*/ffhq-dataset-v2\.json cannot be read [^\n]*$"):
        load(tmp_path / "data", tmp_path)


LOSSY = {
    "JPEG": encode(ffhq_image(6), "JPEG", quality=100, subsampling=0),
    "lossy WebP": encode(ffhq_image(6), "WEBP", quality=100),
    "lossy WebP with metadata": encode(ffhq_image(6), "WEBP", quality=100, exif=b"Exif\0\0VP8L"),
    "PNG of 16 bits": png_of_16_bits(),
    "GIF": encode(ffhq_image(6), "GIF"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_an_image_that_may_have_lost_something_is_named(kind, tmp_path):
    write_folder(tmp_path, {6: LOSSY[kind]})
    with pytest.raises(UserError, match=r"00006\.png is neither a PNG of 8 bits a channel nor los"):
        load(tmp_path / "data", tmp_path)


def test_lossless_webp_with_metadata_is_taken(tmp_path):
    image = ffhq_image(6)
    write_folder(tmp_path, {6: encode(image, "WEBP", lossless=True, exif=b"Exif\0\0odd")})
    assert_complete(load(tmp_path / "data", tmp_path))


SMALL = image_data.PIXELS - 1
WRONG_TARS = {
    "missing member": ({6: None}, "00004.tar of .* lacks 00006.webp"),
    "truncated image": ({6: webp(ffhq_image(6))[:-40]}, "00006.webp of 00004.tar is damaged"),
    "wrong size": ({6: webp(picture(6, SMALL, SMALL))}, r"00006.webp of 00004.tar .*\(15, 15, 3\)"),
    "greyscale": (
        {6: encode(ffhq_image(6).convert("L"), "PNG")},
        r"00006.webp of 00004.tar .*\(16, 16, 1\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG_TARS)
def test_a_wrong_image_of_a_tar_is_named(kind, hub, tmp_path):
    changes, words = WRONG_TARS[kind]
    hub.files["00004.tar"] = image_data.tar_bytes(members(4, changes))
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        load(tmp_path)
    hub.files["00004.tar"] = image_data.tar_bytes(members(4))
    hub.downloads.clear()
    assert_complete(load(tmp_path))
    assert "00000.tar" not in hub.downloads


@pytest.mark.parametrize(
    ("name", "words"),
    [("00006.webp", r"00006\.webp twice"), ("00003.webp", r"00003\.webp outside 00004 … 00007")],
)
def test_a_duplicate_or_stray_member_is_named(name, words, hub, tmp_path):
    extra = (name, webp(ffhq_image(6)))
    hub.files["00004.tar"] = image_data.tar_bytes([*members(4), extra])
    with pytest.raises(UserError, match=rf"^00004\.tar of [^\n]* has {words}"):
        load(tmp_path)


def test_a_truncated_tar_is_named(hub, tmp_path):
    hub.files["00004.tar"] = hub.files["00004.tar"][:3000]
    with pytest.raises(UserError, match=r"^[^\n]*00004\.tar (cannot be read|of .* lacks)[^\n]*$"):
        load(tmp_path)


def test_what_is_no_tar_is_named_in_one_line(hub, tmp_path):
    hub.files["00004.tar"] = b"x" + hub.files["00004.tar"]  # tarfile's own message has five lines
    with pytest.raises(UserError, match=r"^[^\n]*00004\.tar cannot be read [^\n]*$"):
        load(tmp_path)


def test_a_tar_damaged_on_its_way_is_fetched_again(hub, tmp_path):
    hub.corrupt = {"00004.tar"}
    with pytest.raises(UserError, match=r"^[^\n]*00004\.tar was damaged in transfer[^\n]*$"):
        load(tmp_path)
    hub.corrupt = set()
    assert_complete(load(tmp_path))


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("kind", ["missing", "truncated", "wrong size", "greyscale"])
def test_a_wrong_file_of_the_release_is_named(kind, write, tmp_path):
    content, words = {
        "missing": (None, "lacks 00004/00006.png"),
        "truncated": (encode(ffhq_image(6), "PNG")[:-30], "00006.png is damaged"),
        "wrong size": (encode(picture(6, SMALL, SMALL), "PNG"), r"00006.png .*\(15, 15, 3\)"),
        "greyscale": (encode(ffhq_image(6).convert("L"), "PNG"), r"00006.png .*\(16, 16, 1\)"),
    }[kind]
    write(tmp_path, {6: content})
    with pytest.raises(UserError, match=rf"^{tmp_path}/images1024x1024[^\n]*{words}[^\n]*$"):
        load(tmp_path / "data", tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_has_a_file_twice_is_refused(tmp_path):
    write_zip(tmp_path)
    with zipfile.ZipFile(tmp_path / "images1024x1024.zip", "a") as file:
        file.writestr("images1024x1024/00004/00006.png", b"")
    with pytest.raises(UserError, match=r"images1024x1024\.zip has 00004/00006\.png twice"):
        load(tmp_path / "data", tmp_path)


def test_an_empty_manual_dir_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"manual_dir={tmp_path}: found neither a folder images"):
        load(tmp_path / "data", tmp_path)


WAYS_OUT = r"[^\n]*HF_ENDPOINT[^\n]*dataset\.manual_dir$"


def test_a_missing_tar_is_named_before_anything_is_fetched(hub, tmp_path):
    del hub.files["00008.tar"]
    with pytest.raises(UserError, match=rf"^[^\n]* lacks 00008\.tar: {WAYS_OUT}"):
        load(tmp_path)
    assert not hub.downloads


@pytest.mark.parametrize("leave_out", ["siblings", "size", "lfs"])
def test_a_mirror_that_tells_too_little_is_one_line(leave_out, hub, tmp_path, monkeypatch):
    listing = hub.listing()

    def less():
        for file in listing["siblings"]:
            file.pop(leave_out, None)
        return {key: value for key, value in listing.items() if key != leave_out}

    monkeypatch.setattr(hub, "listing", less)
    with pytest.raises(UserError, match=rf"^[^\n]*lacks[^\n]*: {WAYS_OUT}"):
        load(tmp_path)


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_a_refusing_hub_is_one_line(status, hub, tmp_path):
    hub.status = status
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^[^\n]*cannot be read \([^\n]*\): {WAYS_OUT}"):
        load(tmp_path)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("reason", ["refused", "silent", "offline"])
def test_without_the_web_both_ways_out_are_named_in_time(reason, tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if reason == "silent":
            monkeypatch.setattr(ffhq1024, "_HUB_SECONDS", 1.0)
            server.listen()  # takes connections and never answers
        if reason == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        point_at(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"^[^\n]*cannot be read \([^\n]*\): {WAYS_OUT}"):
            load(tmp_path)
        assert time.monotonic() - start < 20
