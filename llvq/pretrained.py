"""Trained models that come with the project, by the names that their index gives them.

An entry of the index, checkpoints/index.json, holds the run's `config`, the `command` that trained
it, its `seed`, the `step` of the checkpoint, and the `metrics` of its evaluation.
"""

import json
import pathlib
from typing import Any

from llvq import checkpointing
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
    return json.loads((DIRECTORY / "index.json").read_text())


def load_pretrained(name: str) -> VQVAE:
    """A trained model, ready to encode, decode and reconstruct.

    Args:
      name: one of `pretrained_index()`.

    Raises:
      UserError: if there is no such model.
    """
    index = pretrained_index()
    if name not in index:
        raise UserError(f"no trained model {name!r}: there are {', '.join(index) or 'none yet'}")
    return checkpointing.model_of(checkpointing.load(DIRECTORY / name))
