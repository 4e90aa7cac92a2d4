"""The real FashionMNIST, where its IDX files and what reads them are at hand."""

import importlib.util

import pytest


def idx_dir():
    if importlib.util.find_spec("tensorflow") is None:
        return None
    import tensorflow_datasets as tfds
    from etils import epath

    from input_pipeline import fashion_mnist

    manual_dir = epath.Path(tfds.core.constants.DATA_DIR) / "downloads/manual/fashion_mnist"
    for directory in (manual_dir, fashion_mnist._DEBIAN_DIR):
        if (directory / "train-images-idx3-ubyte.gz").exists():
            return directory
    return None


needs_files = pytest.mark.skipif(
    idx_dir() is None, reason="needs FashionMNIST's IDX files: ./run.sh --setup gets them"
)
