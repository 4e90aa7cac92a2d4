"""Damaged files: every load ends in the right images or in one line, and takes nothing along.

Where a checksum covers every byte (IDX files, zips, PNG, ArrayRecord, TFRecord) only the right
pixels may come out; in a folder of JPEG files, in WebP and in weights, other values may, and so
they may where a whole shard is a good one of another split.
"""

import gzip
import hashlib
import json
import math
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorflow", reason="the input pipeline needs TensorFlow")

import tensorflow_datasets as tfds

from llvq import train
from tests import fuzz_targets, fuzzing, image_data, test_celeba, tiny
from tests.fuzz_targets import CELEBA, FFHQ, FFHQ_PER_GROUP

IDX = {"train": ("train-images-idx3-ubyte", 20), "test": ("t10k-images-idx3-ubyte", 10)}


@pytest.fixture(scope="module")
def child():
    child = fuzzing.Child()
    yield child
    child.stop()


def idx_bytes(count):
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    return header + pixels.tobytes()


def official_idx():
    return {
        split: (name, len(idx_bytes(count)), hashlib.sha256(idx_bytes(count)).hexdigest())
        for split, (name, count) in IDX.items()
    }


def write_idx(directory):
    (directory / "manual").mkdir()
    for name, count in IDX.values():
        (directory / "manual" / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(count)))


def tfds_fashion_mnist(file_format):
    def write(directory):
        """Prepared by TFDS itself, from small IDX files."""
        contents = {name: idx_bytes(count) for name, count in IDX.values()}
        image_data.prepare_fashion_mnist(contents, directory / "data", file_format)

    return write


def celeba_files():
    numbers = range(1, sum(CELEBA.values()) + 1)
    yield from ((f"{i:06d}.jpg", test_celeba.face_jpeg(i)) for i in numbers)


def celeba_partition():
    splits = np.repeat([0, 1, 2], list(CELEBA.values()))
    return "".join(f"{i:06d}.jpg {split}\n" for i, split in enumerate(splits, start=1))


def write_celeba_folder(directory):
    (directory / "manual/img_align_celeba").mkdir(parents=True)
    (directory / "manual/list_eval_partition.txt").write_text(celeba_partition())
    for name, content in celeba_files():
        (directory / "manual/img_align_celeba" / name).write_bytes(content)


def write_celeba_zip(directory):
    (directory / "manual").mkdir()
    (directory / "manual/list_eval_partition.txt").write_text(celeba_partition())
    path = directory / "manual/img_align_celeba.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in celeba_files():
            file.writestr(f"img_align_celeba/{name}", content)


def tfds_celeb_a(file_format):
    def write(directory):
        source = directory / "source"
        source.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_celeba, "TOTAL", sum(CELEBA.values()))
            patch.setattr(test_celeba, "partition", celeba_partition)
            test_celeba.write_zip(source / "img_align_celeba")
            test_celeba.write_annotations(source)
            manager = tfds.download.DownloadManager

            def iter_archive(_, path):
                with zipfile.ZipFile(path) as file:
                    for name in file.namelist():
                        yield name, file.read(name)

            patch.setattr(manager, "download", lambda _, urls: {k: source / k for k in urls})
            patch.setattr(manager, "iter_archive", iter_archive)
            tfds.builder(
                "celeb_a", data_dir=directory / "data", file_format=file_format
            ).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
        shutil.rmtree(source)

    return write


def ffhq_files(encode):
    for i in range(sum(FFHQ.values())):
        yield f"{i - i % FFHQ_PER_GROUP:05d}/{i:05d}.png", encode(image_data.ffhq_image(i))


def png(image):
    return image_data.encode(image, "PNG")


def md5s():
    return json.dumps(
        {
            str(i): {
                "image": {"pixel_md5": hashlib.md5(image_data.ffhq_image(i).tobytes()).hexdigest()}
            }
            for i in range(sum(FFHQ.values()))
        }
    )


def write_ffhq_folder(encode):
    def write(directory):
        for name, content in ffhq_files(encode):
            path = directory / "manual/images1024x1024" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return write


def write_ffhq_with_md5s(directory):
    write_ffhq_folder(image_data.webp)(directory)
    (directory / "manual/ffhq-dataset-v2.json").write_text(md5s())


def write_ffhq_zip(directory):
    (directory / "manual").mkdir()
    with zipfile.ZipFile(directory / "manual/images1024x1024.zip", "w") as file:
        for name, content in ffhq_files(png):
            file.writestr(f"images1024x1024/{name}", content)


def write_ffhq_hub(directory):
    (directory / "hub").mkdir()
    for start in range(0, sum(FFHQ.values()), FFHQ_PER_GROUP):
        members = [
            (f"{i:05d}.webp", image_data.webp(image_data.ffhq_image(i)))
            for i in range(start, start + FFHQ_PER_GROUP)
        ]
        (directory / f"hub/{start:05d}.tar").write_bytes(image_data.tar_bytes(members))


def prepared(write, load):
    """What our own preparation makes of files, without the files."""

    def write_prepared(directory):
        write(directory)
        assert load(str(directory))[0] == "done"
        shutil.rmtree(directory / "manual")

    return write_prepared


def half_prepared(write, load):
    """All shards and the files that they came from, but no metadata yet."""

    def write_half(directory):
        write(directory)
        assert load(str(directory))[0] == "done"
        (info,) = directory.glob("data/*/*/dataset_info.json")
        info.unlink()

    return write_half


def write_torch(directory):
    torch = pytest.importorskip("torch", reason="imports are from PyTorch")
    from tests import torch_model

    torch.manual_seed(0)
    model = torch_model.Model("vq_ema", 1, (4,), 1)
    torch.save(torch_model.lightning_file(model), directory / "model.ckpt")


CONFIG = tiny.config("vq_ema", num_train_steps=4, **{"model.hidden_dims": (4,)})


def write_run(directory):
    train.train_and_evaluate(CONFIG, directory, tiny.dataset())


load_fashion_mnist = fuzz_targets.load_fashion_mnist
load_celeba, load_ffhq = fuzz_targets.load_celeba, fuzz_targets.load_ffhq

# Of each layout: what writes it, what loads it with which further arguments, and whether checksums
# cover its content, so that nothing but the right result may come out.
LAYOUTS = {
    "fashion_mnist IDX": (write_idx, load_fashion_mnist, (official_idx(),), True),
    "fashion_mnist TFRecord": (
        *(tfds_fashion_mnist("tfrecord"), load_fashion_mnist, (official_idx(),), True),
    ),
    "fashion_mnist ArrayRecord": (
        *(tfds_fashion_mnist("array_record"), load_fashion_mnist, (official_idx(),), True),
    ),
    "celeba folder": (write_celeba_folder, load_celeba, (), False),
    "celeba zip": (write_celeba_zip, load_celeba, (), True),
    "celeb_a TFRecord": (tfds_celeb_a("tfrecord"), load_celeba, (), True),
    "celeb_a ArrayRecord": (tfds_celeb_a("array_record"), load_celeba, (), True),
    "celeba prepared": (prepared(write_celeba_folder, load_celeba), load_celeba, (), True),
    "celeba half prepared": (half_prepared(write_celeba_zip, load_celeba), load_celeba, (), True),
    "ffhq PNG": (write_ffhq_folder(png), load_ffhq, (), False),
    "ffhq WebP and MD5s": (write_ffhq_with_md5s, load_ffhq, (), True),
    "ffhq zip": (write_ffhq_zip, load_ffhq, (), True),
    "ffhq hub": (write_ffhq_hub, load_ffhq, (), False),
    "PyTorch": (write_torch, fuzz_targets.import_torch, (), False),
    "checkpoint": (write_run, fuzz_targets.load_checkpoint, (CONFIG,), False),
    "checkpoint evaluated": (write_run, fuzz_targets.evaluate_checkpoint, (CONFIG,), False),
}
RARE = {"checkpoint evaluated"}  # compiles each time


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files(layout, child, tmp_path_factory):
    write, load, arguments, is_checked = LAYOUTS[layout]
    original = tmp_path_factory.mktemp("original")
    write(original)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    if layout == "checkpoint evaluated":
        files = [file for file in files if file.match("checkpoints/2/config/metadata")]
    assert files
    directory = tmp_path_factory.mktemp("cases") / "case"

    def fresh():
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(original, directory)

    fresh()
    kind, right = child(load, str(directory), *arguments)
    assert kind == "done"

    share = 0.2 if layout in RARE else 1
    num_examples = math.ceil(share * settings.default.max_examples / 2 / len(LAYOUTS))

    @settings(max_examples=num_examples)
    @given(st.data())
    def run(data):
        file = data.draw(st.sampled_from(files), label="file")
        is_json = (original / file).read_bytes()[:1] == b"{"
        damages = data.draw(fuzzing.damages(is_json), label="damages")
        fresh()
        fuzzing.damage(directory / file, [directory / other for other in files], damages)
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
        elif is_checked and ("other", None, None) not in damages:
            assert result == right

    run()
