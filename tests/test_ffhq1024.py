"""FFHQ-1024, from small copies of the official release and from a hub on the loopback device.

The images are small; everything else is as in the real ones: file names, groups, encodings.
"""

import hashlib
import json
import socket
import struct
import time
import zlib

import huggingface_hub.constants
import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow_datasets as tfds
from absl import logging

from configs import ffhq1024 as ffhq1024_config
from input_pipeline import ffhq1024
from tests import image_data
from tests.image_data import encode, ffhq_image, ffhq_tar, picture, read_images, refused, webp
from tests.image_data import load_ffhq as load

IMAGE = "images1024x1024/00004/00006.png"


def assert_complete(data):
    assert data.num_images == image_data.FFHQ
    train = [np.asarray(ffhq_image(i)) for i in range(12)]
    validation = [np.asarray(ffhq_image(i)) for i in range(12, 16)]
    np.testing.assert_array_equal(read_images(data, "train"), train)
    np.testing.assert_array_equal(read_images(data, "validation"), validation)


def write_folder(directory, changes=None):
    image_data.write_folder(image_data.ffhq_files() | (changes or {}), directory)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the data set; this process's client asks it."""
    hub = image_data.Hub(ffhq1024._HUB_DATASET, ffhq1024._HUB_REVISION)
    with image_data.serve(hub.answer) as url:
        image_data.point_at(url, monkeypatch)
        yield hub


def test_the_numbers_are_the_official_ones():
    indices = ffhq1024._indices(ffhq1024.NUM_IMAGES)
    assert indices == {"train": range(60_000), "validation": range(60_000, 70_000)}
    assert ffhq1024._path(69_999, ffhq1024.IMAGES_PER_GROUP) == "69000/69999.png"
    assert ffhq1024._HUB_REVISION == "d74f1f1f59e3bbe975bee29872b9bef827314577"
    assert ffhq1024_config.get_config("vq").model.image_shape == ffhq1024.IMAGE_SHAPE


def test_official_folder_where_tfds_looks_for_manual_files(tmp_path):
    """Its PNG files are kept as they are; lossless WebP with metadata is taken, too."""
    odd = encode(ffhq_image(6), "WEBP", lossless=True, exif=b"Exif\0\0odd")
    write_folder(tmp_path / "downloads/manual/ffhq1024", {IMAGE: odd})
    assert_complete(load(tmp_path))
    source = tfds.builder_from_directory(tmp_path / "ffhq1024/1.0.0").as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert source[5]["image"] == encode(ffhq_image(5), "PNG")
    assert source[6]["image"] == odd


def test_official_zip_then_the_prepared_directory_alone(tmp_path):
    image_data.write_zip(image_data.ffhq_files(), tmp_path / "manual")
    assert_complete(load(tmp_path / "data", tmp_path / "manual"))
    assert_complete(load(tmp_path / "data"))


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


TAR = ffhq_tar(4)
WRONG_TARS = {
    "no member": (ffhq_tar(4, {"00006.webp": None}), r"00004\.tar of .* lacks 00006\.webp"),
    "member twice": (
        ffhq_tar(4, {"x/00006.webp": webp(ffhq_image(6))}),
        r"^00004\.tar of .* has x/00006\.webp twice",
    ),
    "stray member": (
        ffhq_tar(4, {"00003.webp": webp(ffhq_image(3))}),
        r"^00004\.tar of .* has 00003\.webp outside 00004 … 00007",
    ),
    "truncated image": (
        ffhq_tar(4, {"00006.webp": webp(ffhq_image(6))[:-40]}),
        r"00006\.webp of 00004\.tar is damaged",
    ),
    "truncated": (TAR[:3000], r"00004\.tar (cannot be read|of .* lacks)"),
    "no tar": (b"x" + TAR, r"00004\.tar cannot be read"),  # tarfile's own message has five lines
    "damaged in transfer": (TAR, r"00004\.tar was damaged in transfer"),
}


@pytest.mark.parametrize("kind", WRONG_TARS)
def test_a_wrong_tar_is_named_and_only_what_is_missing_is_fetched_again(kind, hub, tmp_path):
    hub.files["00004.tar"], words = WRONG_TARS[kind]
    hub.corrupt = {"00004.tar"} if kind == "damaged in transfer" else set()
    with refused(words):
        load(tmp_path)
    hub.files["00004.tar"], hub.corrupt = TAR, set()
    hub.downloads.clear()
    assert_complete(load(tmp_path))
    assert hub.downloads == ["00004.tar", "00008.tar", "00012.tar"]


def test_a_release_completes_what_the_hub_began(hub, tmp_path):
    hub.files["00012.tar"] = b"not a tar, but of this checksum"
    with refused(r"00012\.tar cannot be read"):
        load(tmp_path / "data")
    write_folder(tmp_path / "manual")
    assert_complete(load(tmp_path / "data", tmp_path / "manual"))


def published(changes=None):
    """The release's metadata: of each image, among much else, the MD5 of its pixels."""
    entries = {}
    for index in range(16):
        md5 = hashlib.md5(np.array((changes or {}).get(index, ffhq_image(index)))).hexdigest()
        entries[str(index)] = {
            "category": "training" if index < 12 else "validation",
            "metadata": {"author": "image", "pixel_md5": "of nothing"},
            "image": {"file_url": "https://…", "pixel_size": [16, 16], "pixel_md5": md5},
            "thumbnail128x128": {"pixel_size": [128, 128], "pixel_md5": "0" * 32},
        }
    return json.dumps(entries)


def test_pixels_are_compared_with_the_published_md5s(hub, tmp_path):
    metadata = tmp_path / "downloads/manual/ffhq1024/ffhq-dataset-v2.json"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(published({6: ffhq_image(5)}))
    with refused(r"^00006\.webp of 00004\.tar has other pixels than published"):
        load(tmp_path)
    metadata.write_text(published())
    assert_complete(load(tmp_path))


def png_of_16_bits():
    """16×16 zeros in RGB, which Pillow does not write so deep."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 16 * 6))))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def damaged_metadata(content):
    return "ffhq-dataset-v2.json", content, r"/ffhq-dataset-v2\.json cannot be read"


LOSSY = r"00006\.png is neither a PNG of 8 bits a channel nor lossless WebP"
WRONG_FILES = {
    "JPEG": (IMAGE, encode(ffhq_image(6), "JPEG", quality=100, subsampling=0), LOSSY),
    "lossy WebP": (IMAGE, encode(ffhq_image(6), "WEBP", quality=100), LOSSY),
    "lossy WebP with metadata": (
        *(IMAGE, encode(ffhq_image(6), "WEBP", quality=100, exif=b"Exif\0\0VP8L"), LOSSY),
    ),
    "PNG of 16 bits": (IMAGE, png_of_16_bits(), LOSSY),
    "GIF": (IMAGE, encode(ffhq_image(6), "GIF"), LOSSY),
    "greyscale": (
        *(IMAGE, encode(ffhq_image(6).convert("L"), "PNG"), r"00006\.png .*\(16, 16, 1\)"),
    ),
    "wrong size": (IMAGE, encode(picture(6, 15, 15), "PNG"), r"00006\.png .*\(15, 15, 3\)"),
    "no MD5s": damaged_metadata(b""),
    "MD5s in a list": damaged_metadata(b"[]"),
    "half of the MD5s": damaged_metadata(b'{"0": {"image": {"pixel_md5": "12"}}}'),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_of_the_release_is_named(kind, tmp_path):
    name, content, words = WRONG_FILES[kind]
    write_folder(tmp_path, {name: content})
    with refused(f"^{tmp_path}.*{words}"):
        load(tmp_path / "data", tmp_path)


def lacking(key):
    """What changes a hub's listing as a mirror may that tells too little."""

    def change(hub, patch):
        listing = hub.listing()
        for entry in (listing, *listing["siblings"]):
            entry.pop(key, None)
        patch.setattr(hub, "listing", lambda: listing)

    return change


def refusing(status):
    return lambda hub, patch: patch.setattr(hub, "status", status)


def without_a_tar(hub, patch):
    del hub.files["00008.tar"]


def offline(hub, patch):
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


UNREADABLE = r"cannot be read \(.*\)"
HUBS = {
    "lacks a tar": (without_a_tar, r"lacks 00008\.tar"),
    **{f"lacks {key}": (lacking(key), "lacks .*") for key in ("siblings", "size", "lfs")},
    **{f"refuses: {s}": (refusing(s), UNREADABLE) for s in (401, 404, 429, 503)},
    "offline": (offline, UNREADABLE),
}
WAYS_OUT = r": .*HF_ENDPOINT.*dataset\.manual_dir$"


@pytest.mark.parametrize("kind", HUBS)
def test_a_hub_of_no_use_is_told_in_time_with_both_ways_out(kind, hub, tmp_path, monkeypatch):
    change, words = HUBS[kind]
    change(hub, monkeypatch)
    start = time.monotonic()
    with refused(words + WAYS_OUT):
        load(tmp_path)
    assert time.monotonic() - start < 20
    assert not hub.downloads


@pytest.mark.parametrize("listens", [True, False])
def test_without_the_web_both_ways_out_are_named_in_time(listens, tmp_path, monkeypatch):
    monkeypatch.setattr(ffhq1024, "_HUB_SECONDS", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:  # takes connections and never answers
            server.listen()
        image_data.point_at(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        start = time.monotonic()
        with refused(UNREADABLE + WAYS_OUT):
            load(tmp_path)
        assert time.monotonic() - start < 20
