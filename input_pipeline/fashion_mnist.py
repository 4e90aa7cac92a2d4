"""FashionMNIST (Xiao et al. 2017, arXiv 1708.07747): 28×28 greyscale images of clothes.

Images from any place end up in the official order, so that the splits (the first 55,000 and the
last 5,000 training images; 10,000 test images) are the same for everyone.
"""

import gzip
import hashlib
import zlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath

from input_pipeline import image_files
from llvq.data import ArrayDataset, Images
from llvq.errors import UserError

IMAGE_SHAPE = (28, 28, 1)
NUM_TRAIN = 55_000
NUM_IMAGES = {"train": 60_000, "test": 10_000}  # as published, validation images among train

# For each published split: name of the IDX file, and length in bytes and SHA-256 of its
# decompressed content, because distributors recompress the files.
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
_REMEDY = (
    "either fetch its IDX files (Debian: apt-get download dataset-fashion-mnist) and name their "
    "directory with --config.dataset.manual_dir, or name a TFDS directory where it is prepared "
    "with --config.dataset.data_dir"
)


def load(
    data_dir: str = "", manual_dir: str = "", *, num_images: Mapping[str, int] = NUM_IMAGES
) -> ArrayDataset:
    """Reads FashionMNIST from TFDS's directory, local IDX files, or TFDS's download.

    Args:
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of the IDX files (train-images-idx3-ubyte and t10k-images-idx3-ubyte,
        with or without .gz). If empty: DATA_DIR/downloads/manual/fashion_mnist, as TFDS has it,
        then the directory of Debian's package `dataset-fashion-mnist`.
      num_images: the number of images in each split that TFDS prepared.

    Raises:
      UserError: if the data cannot be found or downloaded, or is not FashionMNIST.
    """
    root = image_files.data_directory(data_dir)
    images = None
    if not manual_dir and (root / "fashion_mnist").exists():
        from input_pipeline import fashion_mnist_tfds  # imports TFDS and TensorFlow

        images = fashion_mnist_tfds.read(root, num_images)
    if images is None and (idx_dir := _find_idx_files(manual_dir, root)) is not None:
        logging.info("Reading FashionMNIST from %s", idx_dir)
        images = {split: _read_idx(idx_dir, split) for split in _FILES}
    if images is None:
        from input_pipeline import fashion_mnist_tfds

        images = fashion_mnist_tfds.download(root, num_images, f"{_FILES['train'][0]}.gz", _REMEDY)
    return ArrayDataset(
        fingerprint="",
        train=images["train"][:NUM_TRAIN],
        validation=images["train"][NUM_TRAIN:],
        test=images["test"],
    )


def _find_idx_files(manual_dir: str, root: epath.Path) -> epath.Path | None:
    candidates = [image_files.manual_directory("fashion_mnist", root, manual_dir)]
    if not manual_dir:
        candidates.append(_DEBIAN_DIR)
    for directory in candidates:
        if _idx_file(directory, "train") is not None:
            return directory
    if manual_dir:
        raise UserError(
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
    """Reads the images of an IDX file, whose content must be the official one."""
    name, num_bytes, digest = _FILES[split]
    path = _idx_file(directory, split)
    if path is None:
        raise UserError(f"{directory} lacks {name} (or {name}.gz)")
    remedy = "fetch it again (see docs/data.md)"
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    if len(content) != num_bytes:
        raise UserError(f"{path} has {len(content)} bytes of data, not {num_bytes}: {remedy}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path} is not FashionMNIST's {name}: its content differs; {remedy}")
    return np.frombuffer(content, np.uint8, offset=_HEADER_BYTES).reshape(-1, *IMAGE_SHAPE)
