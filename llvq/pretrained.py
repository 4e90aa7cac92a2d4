"""Trained models that come with the project, by the names that their index gives them.

An entry of the index, checkpoints/index.json, holds the run's `config`, the `command` that trained
it, its `seed`, the `step` of the checkpoint, and the `metrics` of its evaluation.
"""

import json
import os
import pathlib
from typing import Any

from etils import epath

from llvq import checkpointing
from llvq.checkpointing.saved_config import upgrade
from llvq.errors import UserError
from llvq.models.vqvae import VQVAE

_PACKAGE = pathlib.Path(__file__).parent

# An installed package holds the directory; in a checkout it lies beside it.
DIRECTORY = _PACKAGE / "checkpoints"
if not DIRECTORY.exists():
    DIRECTORY = _PACKAGE.parent / "checkpoints"


def pretrained_index() -> dict[str, dict[str, Any]]:
    """The facts about each model, by name, e.g. "fashion_mnist/sparse_lattice".

    A model takes images of the shape and value range that its config says:
    `pretrained_index()[name]["config"]["model"]` has `image_shape` (height, width, channels) and
    `value_range`, what pixel values 0 … 255 were mapped to.
    """
    index = json.loads((DIRECTORY / "index.json").read_text())
    return {name: {**entry, "config": upgrade(entry["config"])} for name, entry in index.items()}


def load_pretrained(name: epath.PathLike) -> VQVAE:
    """A trained model, ready to encode, decode and reconstruct.

    Args:
      name: one of `pretrained_index()`, or the path of a checkpoint or a workdir.

    Returns:
      The model; `llvq.Codec.load` also reads its code model.

    Raises:
      UserError: if there is no such model, it is damaged, or it needs float64 and JAX lacks it.
    """
    return checkpointing.model_of(checkpointing.load(find_pretrained(name)))


def find_pretrained(name: epath.PathLike) -> epath.Path:
    """The path of a trained model.

    Args:
      name: as for `load_pretrained`.

    Raises:
      UserError: if there is no such model.
    """
    index = pretrained_index()
    path = epath.Path(DIRECTORY / name if name in index else name)
    if not path.exists():
        raise UserError(
            f"no trained model {os.fspath(name)!r}, nor a checkpoint or workdir of that path: "
            f"there are {', '.join(index) or 'none yet'}"
        )
    return path
