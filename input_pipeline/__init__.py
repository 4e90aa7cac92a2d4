"""Data sets by name. Only this package knows TensorFlow and the data sets themselves."""

from collections.abc import Callable

from input_pipeline import celeba, fashion_mnist, ffhq1024, tokens
from llvq.data import Dataset
from llvq.errors import UserError

# Each takes data_dir and manual_dir.
DATASETS: dict[str, Callable[[str, str], Dataset]] = {
    "fashion_mnist": fashion_mnist.load,
    "celeba": celeba.load,
    "ffhq1024": ffhq1024.load,
}


def load(name: str, data_dir: str = "", manual_dir: str = "") -> Dataset:
    """Opens a data set, and prepares it first if need be.

    Args:
      name: a key of DATASETS.
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of files fetched by hand; each data set says which.

    Raises:
      UserError: if there is no such data set, or its data is missing or wrong.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, manual_dir)


__all__ = ["DATASETS", "load", "tokens"]
