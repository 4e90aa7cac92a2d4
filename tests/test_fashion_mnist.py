"""Finding, verifying and reading FashionMNIST; tests on its content use the real files."""

import gzip
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow_datasets as tfds
from etils import epath

import input_pipeline
from input_pipeline import fashion_mnist, image_files, tfds_builders
from llvq.errors import UserError
from tests import image_data, real_data
from tests.real_data import needs_files

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def idx_dir(tmp_path_factory):
    """The real files, uncompressed, in a directory of the test's own."""
    directory = tmp_path_factory.mktemp("idx")
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        content = gzip.decompress((real_data.idx_dir() / f"{name}.gz").read_bytes())
        (directory / name).write_bytes(content)
    return directory


def all_images(data, split):
    return image_data.read_images(data, split, batch_size=1000)


@needs_files
def test_split_and_order_are_the_official_files(idx_dir):
    data = input_pipeline.load("fashion_mnist", manual_dir=str(idx_dir))
    assert data.num_images == {"train": 55_000, "validation": 5_000, "test": 10_000}
    train = (idx_dir / "train-images-idx3-ubyte").read_bytes()[16:]
    test = (idx_dir / "t10k-images-idx3-ubyte").read_bytes()[16:]
    pixels = 28 * 28
    assert all_images(data, "train").tobytes() == train[: 55_000 * pixels]
    assert all_images(data, "validation").tobytes() == train[55_000 * pixels :]
    assert all_images(data, "test").tobytes() == test


@needs_files
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_prepared_tfds_directory_gives_the_same_images(file_format, idx_dir, tmp_path):
    """Prepared by TFDS itself, which shuffles what it writes, from the first of the real images."""
    contents = {
        name: (idx_dir / name).read_bytes()[: 16 + count * 28 * 28]
        for name, count in (("train-images-idx3-ubyte", 300), ("t10k-images-idx3-ubyte", 100))
    }
    image_data.prepare_fashion_mnist(contents, tmp_path, file_format)
    with pytest.raises(UserError, match=r"has 300 images in split 'train', not 60000: delete it"):
        input_pipeline.load("fashion_mnist", data_dir=str(tmp_path))
    prepared = fashion_mnist.load(str(tmp_path), num_images={"train": 300, "test": 100})
    local = input_pipeline.load("fashion_mnist", manual_dir=str(idx_dir))
    for split, count in (("train", 300), ("test", 100)):
        expected = local.resident(split)[:count]
        np.testing.assert_array_equal(all_images(prepared, split), expected)


def damaged(content, kind):
    return {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "bit flipped": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        "not gzip": b"<html>404 Not Found</html>",
    }[kind]


@needs_files
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["truncated", "empty", "bit flipped", "not gzip"])
def test_damaged_files_are_refused_by_name(kind, compressed, idx_dir, tmp_path):
    name = "train-images-idx3-ubyte.gz" if compressed else "train-images-idx3-ubyte"
    content = ((real_data.idx_dir() if compressed else idx_dir) / name).read_bytes()
    (tmp_path / name).write_bytes(damaged(content, kind))
    with pytest.raises(UserError, match=rf"^{tmp_path / name} [^\n]*fetch it again[^\n]*$"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


@needs_files
def test_other_data_of_the_right_size_is_refused(idx_dir, tmp_path):
    content = (idx_dir / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content[:16] + bytes(len(content) - 16))
    with pytest.raises(UserError, match="is not FashionMNIST's"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


@needs_files
def test_a_missing_test_file_is_named(idx_dir, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        (idx_dir / "train-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(UserError, match="lacks t10k-images-idx3-ubyte"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


def test_an_empty_manual_dir_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"manual_dir={tmp_path}: found no train-images"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


PROGRAM = """
import sys
import main, input_pipeline
data = input_pipeline.load("fashion_mnist", manual_dir=sys.argv[1])
assert data.num_images["train"] == 55_000
print(*({"tensorflow", "tensorflow_datasets", "clu"} & sys.modules.keys()))
"""


@needs_files
def test_tensorflow_stays_out_of_the_way_to_the_first_step(idx_dir):
    command = [sys.executable, "-c", PROGRAM, str(idx_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_the_directory_of_tfds_is_tfdss_own(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    default = tfds.core.constants.get_default_data_dir
    assert str(image_files.data_directory("")) == str(epath.Path(default()).expanduser())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert str(image_files.data_directory("")) == str(default()) == str(tmp_path)
    assert str(image_files.data_directory("/elsewhere")) == "/elsewhere"


def never_found(*_, **__):
    time.sleep(30)
    raise socket.gaierror("name not known")


@pytest.mark.parametrize("host", ["refuses", "is silent", "has no name that is ever found"])
def test_without_the_web_both_ways_out_are_named_in_time(host, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_DIR", epath.Path(tmp_path / "none"))
    monkeypatch.setattr(tfds_builders, "_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, never answers
        port = 9 if host == "refuses" else server.getsockname()[1]
        monkeypatch.setattr(
            tfds.image_classification.FashionMNIST, "URL", f"http://127.0.0.1:{port}/"
        )
        if host == "has no name that is ever found":
            monkeypatch.setattr(socket, "getaddrinfo", never_found)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be downloaded.*dataset\.manual_dir.*data_dir"):
            input_pipeline.load("fashion_mnist", data_dir=str(tmp_path))
        assert time.monotonic() - start < 7


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"unknown data set 'mnist': choose one of fashion_mnist"):
        input_pipeline.load("mnist")
