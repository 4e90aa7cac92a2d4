"""CelebA, from small copies of each layout in which people hold it."""

import io
import shutil
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from configs import celeba as celeba_config
from input_pipeline import celeba
from llvq.errors import UserError
from tests.image_data import encode, face_jpeg, picture, read_images

NUM_IMAGES = {"train": 8, "validation": 3, "test": 4}
TOTAL = sum(NUM_IMAGES.values())


def partition():
    numbers = [0] * 8 + [1] * 3 + [2] * 4
    return "".join(f"{i:06d}.jpg {number}\n" for i, number in enumerate(numbers, start=1))


def write_folder(directory):
    (directory / "img_align_celeba").mkdir(parents=True)
    for i in range(1, TOTAL + 1):
        (directory / f"img_align_celeba/{i:06d}.jpg").write_bytes(face_jpeg(i))
    (directory / "list_eval_partition.txt").write_text(partition())


def write_zip(path, images=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.mkdir("img_align_celeba")
        for i in range(1, TOTAL + 1):
            content = (images or {}).get(i, face_jpeg(i))
            if content is not None:
                file.writestr(f"img_align_celeba/{i:06d}.jpg", content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("official")
    write_folder(directory)
    return directory


def load(data_dir, manual_dir=""):
    return celeba.load(str(data_dir), str(manual_dir), num_images=NUM_IMAGES)


def assert_complete(data):
    """Every split holds Pillow's decoding, cropped, of its files in the order of their names."""
    assert data.num_images == NUM_IMAGES
    assert data.image_shape == (148, 148, 3)
    number = 1
    for split, count in NUM_IMAGES.items():
        images = read_images(data, split)
        assert images.dtype == np.uint8
        for i in range(count):
            whole = np.asarray(Image.open(io.BytesIO(face_jpeg(number))))
            np.testing.assert_array_equal(images[i], whole[35 : 35 + 148, 15 : 15 + 148])
            number += 1


def test_the_numbers_are_the_official_ones():
    assert celeba.NUM_IMAGES == {"train": 162_770, "validation": 19_867, "test": 19_962}
    names = celeba._file_names(celeba.NUM_IMAGES)
    assert names["validation"][0] == "162771.jpg"
    assert names["test"][0] == "182638.jpg"
    assert names["test"][-1] == "202599.jpg"
    assert celeba_config.get_config("vq").model.image_shape == celeba.IMAGE_SHAPE


def test_official_folder_then_the_prepared_directory_alone(folder, tmp_path):
    manual = tmp_path / "manual"
    shutil.copytree(folder, manual)
    assert_complete(load(tmp_path / "data", manual))
    shutil.rmtree(manual)
    assert_complete(load(tmp_path / "data"))


def test_official_zip_where_tfds_looks_for_manual_files(folder, tmp_path):
    manual = tmp_path / "downloads/manual/celeba"
    write_zip(manual / "img_align_celeba.zip")
    (manual / "list_eval_partition.txt").write_text(partition())
    assert_complete(load(tmp_path))


def test_cropping_while_decoding_is_decoding_and_cropping():
    for subsampling in (0, 1, 2):
        jpeg = encode(picture(3, 218, 178), "JPEG", quality=85, subsampling=subsampling)
        whole = tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE")
        np.testing.assert_array_equal(celeba._decode(jpeg), whole[35:183, 15:163])


def write_annotations(directory):
    """The annotation files that TFDS demands, empty of meaning, and what it names them."""
    files = [f"{i:06d}.jpg" for i in range(1, TOTAL + 1)]
    builder = tfds.builder_cls("celeb_a")
    module = __import__(builder.__module__, fromlist=["_"])
    for name, headings in (
        ("list_attr_celeba", module.ATTR_HEADINGS),
        ("landmarks_celeba", module.LANDMARK_HEADINGS),
    ):
        lines = [str(TOTAL), " ".join(headings), *(f"{f} {'1 ' * len(headings)}" for f in files)]
        (directory / name).write_text("\n".join(lines) + "\n")
    (directory / "identity_celeba").write_text("".join(f"{f} 1\n" for f in files))
    (directory / "list_eval_partition").write_text(partition())


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_prepared_tfds_directory_gives_the_same_images(
    file_format, tmp_path, monkeypatch, caplog
):
    """Prepared by TFDS itself, in several shards; TFDS shuffles what it writes."""
    source = tmp_path / "source"
    write_zip(source / "img_align_celeba")
    write_annotations(source)

    def iter_archive(_, path):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                yield name, file.read(name)

    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download", lambda _, urls: {k: source / k for k in urls})
    monkeypatch.setattr(manager, "iter_archive", iter_archive)
    data_dir = tmp_path / "data"
    tfds.builder("celeb_a", data_dir=data_dir, file_format=file_format).download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3)
    )
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        assert_complete(load(data_dir))
    converted = "from TFRecord to ArrayRecord, once" in caplog.text
    assert converted == (file_format == "tfrecord") == (data_dir / "celeba").exists()
    if converted:
        shutil.rmtree(data_dir / "celeb_a")
        assert_complete(load(data_dir))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", r"line 4: expected 000004\.jpg 0, found 000005\.jpg 0"),  # a file is missing
        ("000003.jpg 0\n", r"line 4: expected 000004\.jpg 0, found 000003\.jpg 0"),  # twice
        ("000004.jpg 2\n", r"line 4: expected 000004\.jpg 0, found 000004\.jpg 2"),
        ("000004.jpg 0\n000004.jpg 0\n", r"line 5: expected 000005\.jpg 0, found 000004\.jpg 0"),
    ],
)
def test_another_partition_is_refused_by_its_line(line, words, tmp_path):
    write_zip(tmp_path / "img_align_celeba.zip")
    path = tmp_path / "list_eval_partition.txt"
    path.write_text(partition().replace("000004.jpg 0\n", line))
    with pytest.raises(UserError, match=rf"^{path}, {words}"):
        load(tmp_path / "data", tmp_path)


def test_a_missing_partition_file_is_named(tmp_path):
    write_zip(tmp_path / "img_align_celeba.zip")
    with pytest.raises(UserError, match=r"^[^\n]*list_eval_partition\.txt cannot be read"):
        load(tmp_path / "data", tmp_path)


DAMAGED = {
    "missing": (None, "lacks 000009.jpg"),
    "truncated": (face_jpeg(9)[:-300], r"000009\.jpg is damaged"),
    "png": (encode(picture(9, 218, 178), "PNG"), r"000009\.jpg is damaged"),
    "wrong size": (encode(picture(9, 178, 218), "JPEG"), r"000009\.jpg has .*\(178, 218, 3\)"),
    "greyscale": (
        encode(picture(9, 218, 178).convert("L"), "JPEG"),
        r"000009\.jpg has .*\(218, 178, 1\)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_wrong_image_is_named(kind, tmp_path):
    content, words = DAMAGED[kind]
    write_zip(tmp_path / "img_align_celeba.zip", {9: content})
    (tmp_path / "list_eval_partition.txt").write_text(partition())
    with pytest.raises(UserError, match=rf"^{tmp_path}/img_align_celeba\.zip[^\n]*{words}[^\n]*$"):
        load(tmp_path / "data", tmp_path)


def test_a_damaged_zip_is_named(folder, tmp_path):
    path = tmp_path / "img_align_celeba.zip"
    write_zip(path)
    shutil.copy(folder / "list_eval_partition.txt", tmp_path)
    content = path.read_bytes()
    place = content.index(face_jpeg(9)) + 500
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match=r"000009\.jpg cannot be read \(Bad CRC-32[^\n]*$"):
        load(tmp_path / "data", tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"^{path} cannot be read \(File is not a zip file\)"):
        load(tmp_path / "data", tmp_path)


@pytest.mark.parametrize("kind", ["no UTF-8", "long"])
def test_a_zip_whose_list_of_files_is_damaged_is_one_short_line(kind, folder, tmp_path):
    path = tmp_path / "img_align_celeba.zip"
    write_zip(path)
    shutil.copy(folder / "list_eval_partition.txt", tmp_path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)  # of 000001.jpg
    if kind == "no UTF-8":
        content[entry + 9] |= 8  # "the name is in UTF-8"
        content[entry + 46] = 0x9B
    else:
        header = content.index(b"PK\x03\x04", 4)
        content[header + 27] |= 16  # the name in front of the file is 4 kB long
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}[^\n]* cannot be read [^\n]{{1,300}}$"):
        load(tmp_path / "data", tmp_path)


def test_an_empty_manual_dir_is_named(tmp_path):
    words = rf"manual_dir={tmp_path}: found neither a folder img_align_celeba"
    with pytest.raises(UserError, match=words):
        load(tmp_path / "data", tmp_path)


WAY_OUT = r"fetch img_align_celeba\.zip and list_eval_partition\.txt from .*dataset\.manual_dir$"


def test_without_the_web_the_way_out_is_named_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(celeba, "_PROBE_URL", "http://127.0.0.1:9/")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^[^\n]*cannot be downloaded[^\n]*{WAY_OUT}"):
        load(tmp_path)
    assert time.monotonic() - start < 20


class Quota(BaseHTTPRequestHandler):
    """Google Drive's answer once a file has been fetched too often."""

    def do_GET(self):
        page = b"<html><title>Google Drive - Quota exceeded</title></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


def test_google_drives_quota_is_one_line(tmp_path, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Quota)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/uc?export=download&id="
    module = __import__(tfds.builder_cls("celeb_a").__module__, fromlist=["_"])
    for name in ("IMG_ALIGNED_DATA", "EVAL_LIST", "LANDMARKS_DATA", "ATTR_DATA", "IDENTITY_DATA"):
        monkeypatch.setattr(module, name, url + name)
    monkeypatch.setattr(celeba, "_PROBE_URL", url)
    try:
        with pytest.raises(UserError, match=rf"^[^\n]*cannot be downloaded[^\n]*{WAY_OUT}"):
            load(tmp_path)
    finally:
        server.shutdown()
        server.server_close()
