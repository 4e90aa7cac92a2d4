"""The configs that checkpoints hold, those of older versions included."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from llvq import config as configs
from llvq.config import TrainConfig
from llvq.errors import UserError
from llvq.fields import flatten, plain
from llvq.models import NETWORKS, factory
from llvq.quantizers import QUANTIZERS
from llvq.training import objective
from llvq.training.objective import LOSSES
from llvq.training.optimizer import OPTIMIZERS

SavedConfig = Mapping[str, Any]

# Where a saved config names no activation, the encoder ended in none before these quantizers.
_ONCE_WITHOUT_ACTIVATION = (
    *("fsq", "lfq", "bsq", "diagonal_lattice", "d4_lattice", "e8_lattice", "leech_lattice"),
    *("learned_lattice", "multirate_lattice"),
)

# What decides a run's result besides its length and its learning rate.
_OF_A_RUN = (
    *("task", "seed", "batch_size", "init_from", "model", "quantizer", "loss", "loss_options"),
    *(f"dataset.{name}" for name in ("name", "fit", "flip", "convert", "skip_damaged")),
    "optimizer",
)


_REGISTRIES: dict[str, tuple[Mapping[str, Any], str]] = {
    "model": (NETWORKS, "llvq.models.NETWORKS"),
    "quantizer": (QUANTIZERS, "llvq.quantizers.QUANTIZERS"),
    "optimizer": (OPTIMIZERS, "llvq.training.optimizer.OPTIMIZERS"),
    "loss": (LOSSES, "llvq.training.objective.LOSSES"),
}


def upgrade(saved: SavedConfig) -> dict[str, Any]:
    """Rewrites a saved config in the fields of this version.

    A field that is newer than the version that saved the config gets the value that reproduces what
    that version did.
    """
    values = plain(saved)
    # Once the config said what the user had asked for, and `derived` what the run used.
    for name, value in values.pop("derived", {}).items():
        section, _, field = name.rpartition(".")
        (values[section] if section else values)[field] = value
    values.pop("images_per_device", None)
    quantizer = dict(values["quantizer"])
    if "initialisation" in quantizer:
        quantizer["initialization"] = quantizer.pop("initialisation")
    model = {"output_activation": "leaky_relu", **values["model"]}
    if model.get("name", "paper") != "paper":
        del model["output_activation"]
    elif not model.get("latent_activation"):
        is_linear = quantizer["name"] in _ONCE_WITHOUT_ACTIVATION
        model["latent_activation"] = "none" if is_linear else "leaky_relu"
    # An imported model does not know its images' size.
    model["image_shape"] = tuple(size or 0 for size in model.get("image_shape", (0, 0, 0)))
    if model.get("value_range") is None:  # the authors' of as many channels
        model["value_range"] = AUTHORS_VALUE_RANGES.get(model["image_shape"][-1], (0.0, 1.0))
    return {**values, "model": model, "quantizer": quantizer}


# What the authors mapped pixel values 0 … 255 to, by the number of channels: FashionMNIST, and
# CelebA and FFHQ.
AUTHORS_VALUE_RANGES = {1: (-0.5, 0.5), 3: (0.0, 1.0)}


def from_saved(saved: SavedConfig) -> TrainConfig:
    """Reads a checkpoint's config. Height and width are 0 in an imported one.

    Raises:
      UserError: if it is of another task, or names a network, quantizer, loss or optimizer that is
        not registered.
    """
    task = saved.get("task", TrainConfig.task)
    if task != TrainConfig.task:
        raise UserError(f"the checkpoint is of the task {task!r}, not of {TrainConfig.task!r}")
    values = upgrade(saved)
    named = [
        *((section, values[section].get("name")) for section in ("model", "quantizer")),
        ("optimizer", values.get("optimizer", {}).get("name")),
        *(("loss", name) for name in values.get("loss", {}) if name != objective.QUANTIZER),
    ]
    for section, name in named:
        registry, where = _REGISTRIES[section]
        if name is not None and name not in registry:
            raise UserError(
                f"the checkpoint's {section} is {name!r}, which is not registered: import what "
                f"does {where}[{name!r}] = … first"
            )
    try:
        return configs.build(values)
    except UserError as error:  # what was saved was a possible config
        raise ValueError(str(error)) from error


def check_resumable(config: TrainConfig, saved: TrainConfig, workdir: os.PathLike | str) -> None:
    """Raises UserError, naming the first field that differs, if `saved` is another run's config."""
    ours, theirs = (flatten(configs.to_dict(each)) for each in (config, saved))
    # The most telling first.
    for field in sorted(ours.keys() | theirs, key=lambda name: (not name.endswith(".name"), name)):
        matters = any(field == name or field.startswith(f"{name}.") for name in _OF_A_RUN)
        if matters and ours.get(field) != theirs.get(field):
            raise UserError(
                f"{os.fspath(workdir)} holds a run with {field}={theirs.get(field)!r}, not "
                f"{ours.get(field)!r}: use another directory, or the same {field}"
            )


def check_initial(config: TrainConfig, saved: TrainConfig, where: str) -> None:
    """Raises UserError if a run cannot start from the parameters of another config.

    Network and quantizer must have the same names, and all parameters the same shapes. Options that
    differ are logged.

    Args:
      config: of the run.
      saved: of the checkpoint with the parameters.
      where: that checkpoint, for the message.
    """
    for section in ("model", "quantizer"):
        ours, theirs = getattr(config, section).name, getattr(saved, section).name
        if ours != theirs:
            raise UserError(f"{where} has {section}.name={theirs!r}, and this run {ours!r}")
        ours, theirs = getattr(config, section).options, getattr(saved, section).options
        for option in sorted(name for name in ours if ours[name] != theirs[name]):
            logging.info(
                "%s was trained with %s.%s=%s, and this run has %s",
                *(where, section, option, theirs[option], ours[option]),
            )
    ours, theirs = (_shapes(each) for each in (config, saved))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{where} does not fit: {name} has the shape {theirs.get(name, 'of nothing')} "
                f"there, and {ours.get(name, 'is nothing')} in this run: use the same options of "
                "model and quantizer"
            )


def _shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    _, *trees = factory.split(factory.abstract_model(config.architecture))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for tree in trees
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
