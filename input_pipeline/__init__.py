"""Data sets by name. Only this package knows TensorFlow and the data sets themselves."""

import importlib
from typing import Any

from llvq.data import Dataset
from llvq.errors import UserError

# Each is a module of this package, imported when it is asked for. Its `load` takes data_dir and
# manual_dir.
DATASETS = ("fashion_mnist", "celeba", "ffhq1024")

# Likewise; `load` also takes the images' shape, and the other fields of config.dataset.
DATASETS_OF_ANY_SIZE = ("image_folder",)


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
      name: one of DATASETS or DATASETS_OF_ANY_SIZE.
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of files fetched by hand; each data set says which.
      image_shape: (height, width, channels) that images are to have, where there is a choice.
      **options: how they come to that shape, likewise; see `llvq.config.DatasetConfig`.

    Raises:
      UserError: if there is no such data set, its data is missing or wrong, or it has no such
        option.
    """
    known = *DATASETS, *DATASETS_OF_ANY_SIZE
    if name not in known:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(known)}")
    module: Any = importlib.import_module(f"input_pipeline.{name}")
    if name in DATASETS_OF_ANY_SIZE:
        return module.load(data_dir, manual_dir, image_shape, **options)
    for option, value in options.items():
        if value:
            raise UserError(f"config.dataset.{option}={value!r}: {name} has no such option")
    return module.load(data_dir, manual_dir)


__all__ = ["DATASETS", "DATASETS_OF_ANY_SIZE", "load"]
