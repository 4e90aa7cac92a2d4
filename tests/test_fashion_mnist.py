"""Finding, verifying and reading FashionMNIST; tests on its content use the real files."""

import gzip
import socket
import time

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow_datasets as tfds
from etils import epath

import input_pipeline
from input_pipeline import DataError, fashion_mnist
from input_pipeline.arrays import Arrays
from llvq.data import order
from tests import image_data, real_data
from tests.real_data import needs_files


@pytest.fixture(scope="module")
def idx_dir(tmp_path_factory):
    """The real files, uncompressed, in a directory of the test's own."""
    directory = tmp_path_factory.mktemp("idx")
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        content = gzip.decompress((real_data.idx_dir() / f"{name}.gz").read_bytes())
        (directory / name).write_bytes(content)
    return directory


def all_images(data, split):
    batches = order.evaluation_batches(data.num_images[split], 1000)
    pairs = list(data.batches(split, batches))
    return np.concatenate([images[batch.mask] for batch, images in pairs])


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
        for name, count in (("train-images-idx3-ubyte", 3000), ("t10k-images-idx3-ubyte", 1000))
    }
    image_data.prepare_fashion_mnist(contents, tmp_path, file_format)
    with pytest.raises(DataError, match=r"has 3000 images in split 'train', not 60000: delete it"):
        input_pipeline.load("fashion_mnist", data_dir=str(tmp_path))
    prepared = fashion_mnist.load(str(tmp_path), num_images={"train": 3000, "test": 1000})
    local = input_pipeline.load("fashion_mnist", manual_dir=str(idx_dir))
    for split, count in (("train", 3000), ("test", 1000)):
        np.testing.assert_array_equal(all_images(prepared, split), all_images(local, split)[:count])


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
    content = (idx_dir / "train-images-idx3-ubyte").read_bytes()
    name = "train-images-idx3-ubyte"
    if compressed:
        content, name = gzip.compress(content, 1), f"{name}.gz"
    (tmp_path / name).write_bytes(damaged(content, kind))
    with pytest.raises(DataError, match=rf"^{tmp_path / name} [^\n]*fetch it again[^\n]*$"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


@needs_files
def test_other_data_of_the_right_size_is_refused(idx_dir, tmp_path):
    content = (idx_dir / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content[:16] + bytes(len(content) - 16))
    with pytest.raises(DataError, match="is not FashionMNIST's"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


@needs_files
def test_a_missing_test_file_is_named(idx_dir, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        (idx_dir / "train-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(DataError, match="lacks t10k-images-idx3-ubyte"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


def test_an_empty_manual_dir_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"manual_dir={tmp_path}: found no train-images"):
        input_pipeline.load("fashion_mnist", manual_dir=str(tmp_path))


def never_found(*_, **__):
    time.sleep(30)
    raise socket.gaierror("name not known")


@pytest.mark.parametrize("host", ["refuses", "is silent", "has no name that is ever found"])
def test_without_the_web_both_ways_out_are_named_in_time(host, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_DIR", epath.Path(tmp_path / "none"))
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never says a word
        port = 9 if host == "refuses" else server.getsockname()[1]
        monkeypatch.setattr(
            tfds.image_classification.FashionMNIST, "URL", f"http://127.0.0.1:{port}/"
        )
        if host == "has no name that is ever found":
            monkeypatch.setattr(socket, "getaddrinfo", never_found)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"cannot be reached.*dataset\.manual_dir.*data_dir"):
            input_pipeline.load("fashion_mnist", data_dir=str(tmp_path))
        assert time.monotonic() - start < 15  # what is left of 20 s is for starting up


def test_unknown_data_set():
    with pytest.raises(DataError, match=r"unknown data set 'mnist': choose one of fashion_mnist"):
        input_pipeline.load("mnist")


def make_arrays():
    images = np.random.default_rng(0).integers(0, 256, (70, 5, 4, 3)).astype(np.uint8)
    return images, Arrays({"train": images})


def test_batches_are_the_images_asked_for():
    images, data = make_arrays()
    assert data.num_images == {"train": 70}
    assert data.image_shape == (5, 4, 3)
    batches = data.batches("train", order.training_batches(70, 16, seed=0))
    asked = order.training_batches(70, 16, seed=0)
    for _, expected, (batch, actual) in zip(range(12), asked, batches, strict=False):
        np.testing.assert_array_equal(batch.index, expected.index)
        assert actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, images[expected.index])


def test_evaluation_drops_nothing():
    images, data = make_arrays()
    np.testing.assert_array_equal(all_images(data, "train"), images)
