"""Damaged files: every load ends in the right images or in one line, and takes nothing along.

Where a checksum covers every byte (IDX files, zips, PNG, ArrayRecord, TFRecord) only the right
pixels may come out; in a folder of JPEG files, in WebP and in weights, other values may, and so
they may where a whole shard is a good one of another split.
"""

import gzip
import hashlib
import json
import math
import random
import shutil

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

from tests import fuzzing, image_data, processes
from tests.fuzz_targets import import_torch, load_celeba, load_fashion_mnist, load_ffhq


@pytest.fixture(scope="module")
def child():
    child = processes.Child()
    yield child
    child.stop()


def idx(count):
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    return header + pixels.tobytes()


IDX = {"train-images-idx3-ubyte": idx(20), "t10k-images-idx3-ubyte": idx(10)}
OFFICIAL_IDX = {
    split: (name, len(content), hashlib.sha256(content).hexdigest())
    for split, (name, content) in zip(("train", "test"), IDX.items(), strict=True)
}


def idx_files():
    return {f"{name}.gz": gzip.compress(content) for name, content in IDX.items()}


def ffhq_webp_and_md5s():
    """Lossless WebP under the release's names, and the release's metadata."""
    images = [image_data.ffhq_image(i) for i in range(sum(image_data.FFHQ.values()))]
    md5s = [hashlib.md5(image.tobytes()).hexdigest() for image in images]
    metadata = json.dumps({str(i): {"image": {"pixel_md5": md5}} for i, md5 in enumerate(md5s)})
    names = image_data.ffhq_files()
    webp = {name: image_data.webp(image) for name, image in zip(names, images, strict=True)}
    return webp | {"ffhq-dataset-v2.json": metadata.encode()}


def folder(files):
    return lambda directory: image_data.write_folder(files(), directory / "manual")


def zipped(files):
    return lambda directory: image_data.write_zip(files(), directory / "manual")


def ffhq_hub(directory):
    (directory / "hub").mkdir()
    for start in range(0, sum(image_data.FFHQ.values()), image_data.FFHQ_PER_GROUP):
        (directory / f"hub/{start:05d}.tar").write_bytes(image_data.ffhq_tar(start))


def prepared(lost):
    """What our own preparation makes of CelebA, but for some files."""

    def write(directory):
        image_data.write_zip(image_data.celeba_files(), directory / "manual")
        assert load_celeba(str(directory))[0] == "done"
        for path in directory.glob(lost):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return write


def pytorch(directory):
    torch = pytest.importorskip("torch", reason="imports are from PyTorch")
    from tests import torch_model

    torch.manual_seed(0)
    model = torch_model.Model("vq_ema", 1, (4,), 1)
    torch.save(torch_model.lightning_file(model), directory / "model.ckpt")


def fashion_mnist(file_format):
    return lambda path: image_data.prepare_fashion_mnist(IDX, path / "data", file_format)


def celeb_a(file_format):
    return lambda path: image_data.prepare_celeb_a(path / "data", file_format, num_shards=2)


# Of each layout: what writes it, what loads it with which further arguments, and whether checksums
# cover its content, so that nothing but the right result may come out.
LAYOUTS = {
    "fashion_mnist IDX": (folder(idx_files), load_fashion_mnist, (OFFICIAL_IDX,), True),
    **{
        f"fashion_mnist {file_format}": (
            *(fashion_mnist(file_format), load_fashion_mnist, (OFFICIAL_IDX,), True),
        )
        for file_format in ("tfrecord", "array_record")
    },
    "celeb_a tfrecord": (celeb_a("tfrecord"), load_celeba, (), True),
    "celeb_a array_record": (celeb_a("array_record"), load_celeba, (), True),
    "celeba folder": (folder(image_data.celeba_files), load_celeba, (), False),
    "celeba zip": (zipped(image_data.celeba_files), load_celeba, (), True),
    "celeba prepared": (prepared("manual"), load_celeba, (), True),
    "celeba half prepared": (prepared("data/*/*/dataset_info.json"), load_celeba, (), True),
    "ffhq WebP and MD5s": (folder(ffhq_webp_and_md5s), load_ffhq, (), True),
    "ffhq hub": (ffhq_hub, load_ffhq, (), False),
    "PyTorch": (pytorch, import_torch, (), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files(layout, child, tmp_path_factory):
    write, load, arguments, is_checked = LAYOUTS[layout]
    original = tmp_path_factory.mktemp("original")
    write(original)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    directory = tmp_path_factory.mktemp("cases") / "case"
    shutil.copytree(original, directory)
    kind, right = child(load, str(directory), *arguments)
    assert kind == "done"

    @settings(max_examples=math.ceil(settings.default.max_examples / 2 / len(LAYOUTS)))
    @given(
        st.sampled_from(files),
        st.lists(st.sampled_from(fuzzing.KINDS), min_size=1, max_size=3),
        st.integers(0, 2**32 - 1),
    )
    def run(file, kinds, seed):
        shutil.rmtree(directory)
        shutil.copytree(original, directory)
        others, randomness = [directory / other for other in files], random.Random(seed)
        for damage in kinds:
            fuzzing.damage(directory / file, others, damage, randomness)
        before = fuzzing.contents(directory)
        kind, result = child(load, str(directory), *arguments)
        event(kind)
        after = fuzzing.contents(directory)
        lost = {path for path in before if after.get(path) != before[path]}
        # Shards whose checksums are damaged are written anew, and a new shard has a new checksum.
        lost -= {directory / file, (directory / file).parent / "checksums.json"}
        if file.name == "checksums.json":
            lost = {path for path in lost if "array_record" not in path.name}
        assert not lost, f"{kind} {result}"
        if kind == "refused":
            assert any(str(path) in result for path in (directory / file).parents) or (
                str(file) in result or file.name in result
            ), result
        elif is_checked and "other" not in kinds:
            assert result == right

    run()
