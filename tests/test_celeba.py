"""CelebA, from small copies of each layout in which people hold it; damaged zips of images."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from configs import celeba as celeba_config
from input_pipeline import celeba
from tests import image_data
from tests.image_data import celeba_files, encode, face_jpeg, picture, read_images, refused
from tests.image_data import load_celeba as load

IMAGE = "img_align_celeba/000009.jpg"
PARTITION = "list_eval_partition.txt"


def assert_complete(data):
    """Every split holds Pillow's decoding, cropped, of its files in the order of their names."""
    assert data.num_images == image_data.CELEBA
    assert data.image_shape == (148, 148, 3)
    number = 1
    for split, count in image_data.CELEBA.items():
        images = read_images(data, split)
        assert images.dtype == np.uint8
        for i in range(count):
            whole = np.asarray(Image.open(io.BytesIO(face_jpeg(number))))
            np.testing.assert_array_equal(images[i], whole[35 : 35 + 148, 15 : 15 + 148])
            number += 1


def write_folder(directory):
    image_data.write_folder(celeba_files(), directory)


def test_the_numbers_are_the_official_ones():
    assert celeba.NUM_IMAGES == {"train": 162_770, "validation": 19_867, "test": 19_962}
    names = celeba._file_names(celeba.NUM_IMAGES)
    assert names["validation"][0] == "162771.jpg"
    assert names["test"][0] == "182638.jpg"
    assert names["test"][-1] == "202599.jpg"
    assert celeba_config.get_config("vq").model.image_shape == celeba.IMAGE_SHAPE


def test_official_folder_then_the_prepared_directory_alone(tmp_path):
    write_folder(tmp_path / "manual")
    assert_complete(load(tmp_path / "data", tmp_path / "manual"))
    shutil.rmtree(tmp_path / "manual")
    assert_complete(load(tmp_path / "data"))


def test_official_zip_where_tfds_looks_for_manual_files(tmp_path):
    image_data.write_zip(celeba_files(), tmp_path / "downloads/manual/celeba")
    assert_complete(load(tmp_path))


def test_cropping_while_decoding_is_decoding_and_cropping():
    for subsampling in (0, 1, 2):
        jpeg = encode(picture(3, 218, 178), "JPEG", quality=85, subsampling=subsampling)
        whole = tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE")
        np.testing.assert_array_equal(celeba._decode(jpeg), whole[35:183, 15:163])


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_prepared_tfds_directory_gives_the_same_images(file_format, tmp_path, caplog):
    """Prepared by TFDS itself, in several shards; TFDS shuffles what it writes."""
    image_data.prepare_celeb_a(tmp_path, file_format, num_shards=3)
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        assert_complete(load(tmp_path))
    converted = "from TFRecord to ArrayRecord, once" in caplog.text
    assert converted == (file_format == "tfrecord") == (tmp_path / "celeba").exists()
    if converted:
        shutil.rmtree(tmp_path / "celeb_a")
        assert_complete(load(tmp_path))


def partition(line):
    """The official list with another fourth line."""
    return celeba_files()[PARTITION].replace(b"000004.jpg 0\n", line)


WRONG_FILES = {
    "list without a file": (PARTITION, partition(b""), r"4: expected 000004\.jpg 0, .* 000005"),
    "list with a file twice": (
        *(PARTITION, partition(b"000004.jpg 0\n000004.jpg 0\n"), r"line 5: expected 000005\.jpg 0"),
    ),
    "other split": (PARTITION, partition(b"000004.jpg 2\n"), r"line 4: .* found 000004\.jpg 2;"),
    "no list": (PARTITION, None, " cannot be read"),
    "missing": (IMAGE, None, r"lacks 000009\.jpg"),
    "truncated": (IMAGE, face_jpeg(9)[:-300], r"000009\.jpg is damaged"),
    "PNG": (IMAGE, encode(picture(9, 218, 178), "PNG"), r"000009\.jpg is damaged"),
    "wrong size": (
        *(IMAGE, encode(picture(9, 178, 218), "JPEG"), r"000009\.jpg has .*\(178, 218, 3\)"),
    ),
    "greyscale": (
        IMAGE,
        encode(picture(9, 218, 178).convert("L"), "JPEG"),
        r"000009\.jpg has .*\(218, 178, 1\)",
    ),
}


@pytest.mark.parametrize("write", [image_data.write_folder, image_data.write_zip])
@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_named(kind, write, tmp_path):
    name, content, words = WRONG_FILES[kind]
    write(celeba_files() | {name: content}, tmp_path)
    with refused(f"^{tmp_path}/{name.split('/')[0]}.*{words}"):
        load(tmp_path / "data", tmp_path)


def of_another_encoding(content):
    """Says that the first image's name, which is not, is in UTF-8."""
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    damaged = bytearray(content)
    damaged[entry + 9] |= 8
    damaged[entry + 46] = 0x9B
    return bytes(damaged)


def of_a_long_name(content):
    """Says that the name in front of the first image has 4 kB."""
    place = content.index(b"PK\3\4", 4) + 27
    return content[:place] + bytes([content[place] | 16]) + content[place + 1 :]


DAMAGED_ZIPS = {
    "bit flipped": (
        lambda content: image_data.flip(content, content.index(face_jpeg(9)) + 500),
        r"/000009\.jpg cannot be read \(Bad CRC-32.*",
    ),
    "truncated": (lambda content: content[: len(content) // 2], r" cannot be read \(File is not a"),
    "name not in UTF-8": (of_another_encoding, r".* cannot be read .{1,300}$"),
    "long name": (of_a_long_name, r".* cannot be read .{1,300}$"),
    "file twice": (
        lambda content: content.replace(b"/000009.jpg", b"/000008.jpg"),
        r" has 000008\.jpg twice",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED_ZIPS)
def test_a_damaged_zip_is_named(kind, tmp_path):
    image_data.write_zip(celeba_files(), tmp_path)
    path = tmp_path / "img_align_celeba.zip"
    damage, words = DAMAGED_ZIPS[kind]
    path.write_bytes(damage(path.read_bytes()))
    with refused(f"^{path}{words}"):
        load(tmp_path / "data", tmp_path)


def test_an_empty_manual_dir_is_named(tmp_path):
    with refused(f"manual_dir={tmp_path}: found neither a folder img_align_celeba"):
        load(tmp_path / "data", tmp_path)


@pytest.mark.parametrize("answers", [True, False])
def test_google_drives_quota_is_told_with_the_way_out(answers, tmp_path, monkeypatch):
    """Google Drive answers with a page once a file has been fetched too often."""
    page = b"<html><title>Google Drive - Quota exceeded</title></html>"
    headers = {"Content-Type": "text/html; charset=utf-8"}
    module = __import__(tfds.builder_cls("celeb_a").__module__, fromlist=["_"])
    with image_data.serve(lambda path, is_get: (200, headers, page)) as host:
        url = f"{host}/uc?export=download&id="
        for name in ("IMG_ALIGNED_DATA", "EVAL_LIST", "LANDMARKS_DATA", "ATTR_DATA"):
            monkeypatch.setattr(module, name, url + name)
        monkeypatch.setattr(module, "IDENTITY_DATA", f"{url}IDENTITY_DATA")
        # Nothing listens on port 9.
        monkeypatch.setattr(celeba, "_PROBE_URL", url if answers else "http://127.0.0.1:9/")
        files = r"img_align_celeba\.zip and list_eval_partition\.txt"
        with refused(rf"cannot be downloaded.*fetch {files} from .*dataset\.manual_dir$"):
            load(tmp_path)
