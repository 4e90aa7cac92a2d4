"""Data sets by name. Only this package knows TensorFlow and the data sets themselves."""

from collections.abc import Callable
from typing import Any

from input_pipeline import celeba, fashion_mnist, ffhq1024, image_folder, tokens
from llvq.data import Dataset
from llvq.errors import UserError

# Each takes data_dir and manual_dir.
DATASETS: dict[str, Callable[[str, str], Dataset]] = {
    "fashion_mnist": fashion_mnist.load,
    "celeba": celeba.load,
    "ffhq1024": ffhq1024.load,
}

# Each takes data_dir, manual_dir, the images' shape, and the other fields of config.dataset.
DATASETS_OF_ANY_SIZE: dict[str, Callable[..., Dataset]] = {"image_folder": image_folder.load}


def load(
    name: str,
    data_dir: str = "",
    manual_dir: str = "",
    *,
    image_shape: tuple[int, int, int] | None = None,
    **options: Any,
) -> Dataset:
    """Opens a data set, and prepares it first if need be.

    Args:
      name: a key of DATASETS or of DATASETS_OF_ANY_SIZE.
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of files fetched by hand; each data set says which.
      image_shape: (height, width, channels) that images are to have, where there is a choice.
      **options: how they come to that shape, likewise; see `llvq.config.DatasetConfig`.

    Raises:
      UserError: if there is no such data set, its data is missing or wrong, or it has no such
        option.
    """
    if name in DATASETS_OF_ANY_SIZE:
        return DATASETS_OF_ANY_SIZE[name](data_dir, manual_dir, image_shape, **options)
    if name not in DATASETS:
        known = ", ".join([*DATASETS, *DATASETS_OF_ANY_SIZE])
        raise UserError(f"unknown data set {name!r}: choose one of {known}")
    for option, value in options.items():
        if value:
            raise UserError(f"config.dataset.{option}={value!r}: {name} has no such option")
    return DATASETS[name](data_dir, manual_dir)


__all__ = ["DATASETS", "DATASETS_OF_ANY_SIZE", "load", "tokens"]
