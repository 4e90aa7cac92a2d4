"""FashionMNIST (Xiao et al. 2017, arXiv 1708.07747): 28×28 greyscale images of clothes.

Wherever the images come from they end in the official order, so that the split (the first 55,000
and the last 5,000 training images; 10,000 test images) is the same for everyone.
"""

import gzip
import hashlib
import zlib
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jaxtyping import UInt8

from input_pipeline import records, web
from input_pipeline.arrays import Arrays
from input_pipeline.errors import DataError

IMAGE_SHAPE = (28, 28, 1)
NUM_TRAIN = 55_000
NUM_IMAGES = {"train": 60_000, "test": 10_000}  # as published; the last ones are for validation

# TFDS's split: the IDX file's name, its length in bytes and SHA-256, both once decompressed:
# distributors recompress the files.
_FILES = {
    "train": (
        "train-images-idx3-ubyte",
        47_040_016,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "test": (
        "t10k-images-idx3-ubyte",
        7_840_016,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
}
_HEADER_BYTES = 16
_DEBIAN_DIR = epath.Path("/usr/share/datasets/fashion-mnist")

Images = UInt8[np.ndarray, "n 28 28 1"]


def load(
    data_dir: str = "", manual_dir: str = "", *, num_images: Mapping[str, int] = NUM_IMAGES
) -> Arrays:
    """FashionMNIST from wherever it is: TFDS's directory, local IDX files, or TFDS's download.

    Args:
      data_dir: of TFDS; its default if empty.
      manual_dir: where the IDX files lie (train-images-idx3-ubyte and t10k-images-idx3-ubyte, with
        or without .gz). If empty: DATA_DIR/downloads/manual/fashion_mnist, as TFDS has it, then
        where Debian's package `dataset-fashion-mnist` puts them.
      num_images: in each split of what TFDS prepared.

    Raises:
      DataError: if the data is nowhere to be had, or what is there is not FashionMNIST.
    """
    data_dir = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = records.find_builder("fashion_mnist", data_dir)
    if not manual_dir and builder.is_prepared():
        images = _read_tfds(builder, num_images)
    elif (idx_dir := _find_idx_files(manual_dir, data_dir)) is not None:
        logging.info("Reading FashionMNIST from %s", idx_dir)
        images = {split: _read_idx(idx_dir, split) for split in _FILES}
    else:
        images = _read_tfds(_download(data_dir), num_images)
    return Arrays(
        {
            "train": images["train"][:NUM_TRAIN],
            "validation": images["train"][NUM_TRAIN:],
            "test": images["test"],
        }
    )


def _find_idx_files(manual_dir: str, data_dir: epath.Path) -> epath.Path | None:
    if manual_dir:
        candidates = [epath.Path(manual_dir).expanduser()]
    else:
        candidates = [data_dir / "downloads/manual/fashion_mnist", _DEBIAN_DIR]
    for directory in candidates:
        if _idx_file(directory, "train") is not None:
            return directory
    if manual_dir:
        raise DataError(
            f"--config.dataset.manual_dir={manual_dir}: found no {_FILES['train'][0]} or "
            f"{_FILES['train'][0]}.gz in it"
        )
    return None


def _idx_file(directory: epath.Path, split: str) -> epath.Path | None:
    for name in (_FILES[split][0], f"{_FILES[split][0]}.gz"):
        if (directory / name).exists():
            return directory / name
    return None


def _read_idx(directory: epath.Path, split: str) -> Images:
    """The images of an IDX file, which must be the official one byte for byte."""
    name, num_bytes, digest = _FILES[split]
    path = _idx_file(directory, split)
    if path is None:
        raise DataError(f"{directory} lacks {name} (or {name}.gz)")
    remedy = "fetch it again (see README, Data)"
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from error
    if len(content) != num_bytes:
        raise DataError(f"{path} has {len(content)} bytes of data, not {num_bytes}: {remedy}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path} is not FashionMNIST's {name}: its content differs; {remedy}")
    return np.frombuffer(content, np.uint8, offset=_HEADER_BYTES).reshape(-1, *IMAGE_SHAPE)


def _read_tfds(
    builder: tfds.core.DatasetBuilder, num_images: Mapping[str, int]
) -> dict[str, Images]:
    """The images that TFDS prepared, put back from its shuffled into the official order."""
    images = {}
    for split in _FILES:
        try:
            shuffled = _read_tfds_split(builder, split)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{builder.data_path} cannot be read ({reason}): delete it to have it prepared anew"
            ) from error
        if len(shuffled) != num_images[split]:
            raise DataError(
                f"{builder.data_path} has {len(shuffled)} images in split {split!r}, not "
                f"{num_images[split]}: delete it to have it prepared anew"
            )
        hasher = tfds.core.hashing.Hasher(split)  # TFDS writes examples in the order of their hash
        order = sorted(range(len(shuffled)), key=hasher.hash_key)
        images[split] = np.empty_like(shuffled)
        images[split][order] = shuffled
    return images


def _read_tfds_split(builder: tfds.core.DatasetBuilder, split: str) -> Images:
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        dataset = builder.as_dataset(split=split, batch_size=-1, shuffle_files=False)
        return dataset["image"].numpy()
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    encoded = [example["image"] for example in source.__getitems__(range(len(source)))]
    dataset = tf.data.Dataset.from_tensor_slices(encoded)
    dataset = dataset.map(tf.io.decode_png, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(len(encoded)).get_single_element().numpy()


def _download(data_dir: epath.Path) -> tfds.core.DatasetBuilder:
    """TFDS's own download, not begun without the web: TFDS would retry for minutes."""
    builder = tfds.builder(
        "fashion_mnist",
        data_dir=data_dir,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
        try_gcs=False,
    )
    remedy = (
        "either fetch its IDX files (Debian: apt-get download dataset-fashion-mnist) and name "
        "their directory with --config.dataset.manual_dir, or name a TFDS directory where it "
        "is prepared with --config.dataset.data_dir"
    )
    url = f"{builder.URL}{_FILES['train'][0]}.gz"
    if (problem := web.cannot_reach(url)) is not None:
        raise DataError(
            f"FashionMNIST is not in {data_dir} and {url} cannot be reached ({problem}): {remedy}"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"FashionMNIST's download failed ({reason}): {remedy}") from error
    return builder
