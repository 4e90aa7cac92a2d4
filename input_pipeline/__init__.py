"""Data sets by name, as NumPy batches: the only place that knows TensorFlow and data sets."""

from collections.abc import Callable

from input_pipeline import celeba, fashion_mnist, ffhq1024
from input_pipeline.arrays import Arrays
from input_pipeline.errors import DataError
from input_pipeline.pipeline import Pipeline

DATASETS: dict[str, Callable[[str, str], Arrays | Pipeline]] = {
    "fashion_mnist": fashion_mnist.load,
    "celeba": celeba.load,
    "ffhq1024": ffhq1024.load,
}


def load(name: str, data_dir: str = "", manual_dir: str = "") -> Arrays | Pipeline:
    """The data set of a name.

    Args:
      name: a key of DATASETS.
      data_dir: of TFDS; its default if empty.
      manual_dir: where files fetched by hand lie; see each data set.

    Raises:
      DataError: if there is no such data set, or its data is missing or wrong.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, manual_dir)


__all__ = ["DATASETS", "Arrays", "DataError", "Pipeline", "load"]
