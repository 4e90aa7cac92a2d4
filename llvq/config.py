"""The typed schema of a config: its fields with defaults and ranges.

    config = make_config("sparse_lattice", image_shape=(28, 28, 1), num_train_steps=200)

A user writes a config as an ml_collections.ConfigDict (as the files of configs/ make it) or as
nested dicts; `parse` makes a `TrainConfig` of it, the only form inside the package. The options of
a network, quantizer or optimizer, parameters of its constructor, stand beside its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from llvq import fields
from llvq.errors import UserError
from llvq.fields import Integer, Number, Several, Text, plain
from llvq.models import NETWORKS, factory
from llvq.models.factory import Architecture
from llvq.quantizers import registry as quantizers
from llvq.quantizers.registry import QUANTIZERS
from llvq.training import objective
from llvq.training.optimizer import OPTIMIZERS
from llvq.training.schedules import SCHEDULES

_SMALLEST_IMAGE = 11  # SSIM's window


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The data set, for input_pipeline.

    Attributes:
      name: of the data set; input_pipeline/__init__.py lists them.
      data_dir: the directory of TFDS; its default, ~/tensorflow_datasets, if empty.
      manual_dir: the directory of files that were fetched by hand; see docs/data.md.
      fit: how images of any size come to model.image_shape: "resize" scales them and crops the
        centre, "tiles" cuts them up. This field and the next three are for data sets of such images
        only; others refuse them.
      flip: whether training mirrors each image with probability ½.
      convert: whether transparency, 16 bits and other colour spaces are converted, or refused.
      skip_damaged: whether files that cannot be used are left out; if not, they are an error.
    """

    name: Annotated[str, Text()] = ""
    data_dir: Annotated[str, Text()] = ""
    manual_dir: Annotated[str, Text()] = ""
    fit: Literal["", "resize", "tiles"] = ""
    flip: bool = False
    convert: bool = False
    skip_damaged: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network by name; its options are the parameters of its function in `NETWORKS`.

    Attributes:
      name: of `NETWORKS`.
      image_shape: of every image, (height, width, channels). It has no default.
      value_range: what pixel values 0 … 255 are mapped to.
      latent_dim: the number of entries of a latent vector; 0: as many as the quantizer needs.
      options: of the network.
    """

    name: str = "paper"
    image_shape: Annotated[tuple[int, int, int], Several(Integer(0), 3)] = (0, 0, 0)
    value_range: Annotated[tuple[float, float], Several(Number(), 2)] = (0.0, 1.0)
    latent_dim: Annotated[int, Integer(0, 2**16)] = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """A quantizer of `QUANTIZERS` by name; its options are the parameters of its constructor."""

    name: str = "sparse_lattice"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name; its options are the parameters of its function in `OPTIMIZERS`.

    Attributes:
      name: of `OPTIMIZERS`.
      clip_norm: the largest norm of a gradient; a larger one is scaled down. 0: no limit.
      accumulate_steps: into how many parts a step divides its batch, one after the other, to take
        less memory.
      ema_decay: of a moving average of the weights, which validation, evaluation and exports use
        in their place. 0: none.
      options: of the optimizer.
    """

    name: str = "adam"
    clip_norm: Annotated[float, Number(0)] = 0.0
    accumulate_steps: Annotated[int, Integer(1, 2**20)] = 1
    ema_decay: Annotated[float, Number(0, 1, excluded=1)] = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      task: what is trained; checkpoints keep it.
      seed: of the initial parameters, the input order and what is random in training.
      batch_size: images per step, over all devices and hosts.
      num_epochs: the length of the run.
      num_train_steps: the length of the run in steps; if above 0, it wins over num_epochs.
      steps_per_call: steps in one call of the compiled program, if the data set is in memory; each
        device then holds all of it. Reduced to the largest divisor that also divides every
        interval, the run's length and the step it resumes at; 1 on a CPU.
      learning_rate: the optimizer's.
      compute_dtype: the dtype of the network's arithmetic: float32, bfloat16 or float64.
        Parameters, losses and the quantizer stay in float32 (float64 for float64).
      schedule: of the learning rate; see llvq/training/schedules.py.
      init_from: a checkpoint, or a workdir, whose parameters a new run starts from, with a fresh
        optimizer. Empty: the run starts from random parameters.
      keep_checkpoints: how many of the newest are kept, besides the best two by validation loss.
      log_every_steps: how often metrics are logged.
      eval_every_steps: how often the run is validated.
      checkpoint_every_steps: how often it is saved.
      stop_on_failed_save: whether a checkpoint that cannot be saved (a full disk) ends the run. If
        not, it is a warning, unless there are several processes.
      dataset: see `DatasetConfig`.
      model: see `ModelConfig`.
      quantizer: see `QuantizerConfig`.
      loss: the weight of each loss of `LOSSES`, and of the quantizer's loss.
      loss_options: the options of each loss that has any.
      optimizer: see `OptimizerConfig`.
    """

    task: Literal["vqvae"] = "vqvae"
    seed: Annotated[int, Integer(0, 2**32 - 1)] = 0
    batch_size: Annotated[int, Integer(1, 2**20)] = 64
    num_epochs: Annotated[int, Integer(1)] = 1
    num_train_steps: Annotated[int, Integer(0)] = 0
    steps_per_call: Annotated[int, Integer(1, 2**20)] = 1
    learning_rate: Annotated[float, Number(0, 1e30)] = 1e-3
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    schedule: str = "constant"
    init_from: Annotated[str, Text()] = ""
    keep_checkpoints: Annotated[int, Integer(1)] = 2
    log_every_steps: Annotated[int, Integer(1)] = 50
    eval_every_steps: Annotated[int, Integer(1)] = 500
    checkpoint_every_steps: Annotated[int, Integer(1)] = 500
    stop_on_failed_save: bool = True
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    loss: Mapping[str, float] = dataclasses.field(default_factory=dict)
    loss_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def architecture(self) -> Architecture:
        """The part of the config from which its model is made."""
        model, quantizer = self.model, self.quantizer
        return Architecture(
            *(model.name, model.options, quantizer.name, quantizer.options),
            *(model.image_shape, model.latent_dim, model.value_range, self.compute_dtype),
        )


# A config as its user wrote it.
ConfigLike = TrainConfig | Mapping[str, Any]


def _paper(quantizer: str) -> dict[str, Any]:
    return {
        "num_epochs": 1,
        "schedule": "constant",
        "model": {"latent_activation": "leaky_relu", "output_activation": "leaky_relu"},
        **QUANTIZERS[quantizer].paper,
    }


def _standard(quantizer: str) -> dict[str, Any]:
    return {"num_epochs": 10, "schedule": "cosine", "quantizer": QUANTIZERS[quantizer].standard}


# The fields that a recipe sets: as the authors' released models were trained, and ten epochs in
# which the learning rate rises, then falls to 0.
RECIPES: dict[str, Callable[[str], dict[str, Any]]] = {"paper": _paper, "standard": _standard}


def make_config(quantizer: str, /, recipe: str = "standard", **overrides: Any) -> TrainConfig:
    """Makes a config for a quantizer, by a recipe.

    Args:
      quantizer: of llvq.quantizers.QUANTIZERS.
      recipe: of RECIPES.
      **overrides: fields of `TrainConfig`, fields of its section `model` and options of the
        network, by their own names. `quantizer`, `dataset` and `loss` take a dict; `model` and
        `optimizer` take a name, or a dict with the name and options.

    Raises:
      UserError: if there is no such quantizer, recipe or field, or the config is impossible.
    """
    return parse(make_dict(quantizer, recipe, **overrides))


def make_dict(quantizer: str, /, recipe: str = "standard", **overrides: Any) -> dict[str, Any]:
    """Makes the same as nested dicts, which may still be changed and need not be complete."""
    fields.entry(QUANTIZERS, quantizer, "quantizer")
    values = fields.entry(RECIPES, recipe, "recipe")(quantizer)
    sections: dict[str, dict[str, Any]] = {
        name: _as_dict(name, overrides.pop(name, {}))
        for name in ("model", "optimizer", "quantizer")
    }
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    of_model = {name: overrides.pop(name) for name in [*overrides] if name not in known}
    network = sections["model"].get("name", ModelConfig.name)
    if network != ModelConfig.name:  # the recipe's options are the paper's network's
        values.pop("model", None)
    sections["model"] = values.pop("model", {}) | of_model | sections["model"]
    of_quantizer = dict(values.pop("quantizer", {}))
    sections["quantizer"] = of_quantizer | sections["quantizer"] | {"name": quantizer}
    made = to_dict(build({**values, **overrides, **sections}))
    # Options that change later may determine another length.
    made["model"]["latent_dim"] = sections["model"].get("latent_dim", ModelConfig.latent_dim)
    return made


def _as_dict(section: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if not hasattr(value, "items"):
        raise UserError(f"config.{section}={value!r}: must be a name or a dict of fields")
    return dict(plain(value))


def build(config: ConfigLike) -> TrainConfig:
    """Makes a `TrainConfig` of nested dicts, completed with defaults; each field is in its range.

    It may still describe a run that is impossible: see `parse`.

    Raises:
      UserError: if there is no such field or name, or a value is beyond its range.
    """
    values = to_dict(config) if isinstance(config, TrainConfig) else plain(config)
    sections = {
        "dataset": fields.section(DatasetConfig, "dataset", values),
        "model": fields.section(ModelConfig, "model", values, NETWORKS),
        "quantizer": fields.section(QuantizerConfig, "quantizer", values, QUANTIZERS),
        "optimizer": fields.section(OptimizerConfig, "optimizer", values, OPTIMIZERS),
        "loss": objective.complete_weights(values.get("loss", {})),
        "loss_options": objective.complete_options(values.get("loss_options", {})),
    }
    built: TrainConfig = fields.fill(TrainConfig, {**values, **sections})
    fields.entry(SCHEDULES, built.schedule, "config.schedule")
    latent_dim = quantizers.resolve_latent_dim(
        built.quantizer.name, built.quantizer.options, built.model.latent_dim
    )
    return dataclasses.replace(built, model=dataclasses.replace(built.model, latent_dim=latent_dim))


def parse(config: ConfigLike) -> TrainConfig:
    """Checks a config of any form, and makes a `TrainConfig` of it that describes a possible run.

    Raises:
      UserError: if it does not; the message names the field.
    """
    parsed = build(config)
    model = parsed.model
    factory.require_x64(parsed.compute_dtype)
    fields.require(
        min(model.image_shape[:2]) >= _SMALLEST_IMAGE and model.image_shape[2] > 0,
        "model.image_shape",
        model.image_shape,
        f"(height, width, channels), {_SMALLEST_IMAGE} or more high and wide (SSIM)",
    )
    fields.require(
        model.value_range[0] < model.value_range[1],
        "model.value_range",
        model.value_range,
        "two numbers, the lower one first",
    )
    parts = parsed.optimizer.accumulate_steps
    expected = f"a divisor of batch_size={parsed.batch_size}"
    fields.require(parsed.batch_size % parts == 0, "optimizer.accumulate_steps", parts, expected)
    downsampling = factory.abstract_model(parsed.architecture).downsampling
    fields.require(
        all(size % downsampling == 0 for size in model.image_shape[:2]),
        "model.image_shape",
        model.image_shape,
        f"a multiple of {downsampling} in height and width",
    )
    return parsed


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Writes a config as nested dicts, tuples and plain values; `build` reads it."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, section in values.items():
        if dataclasses.is_dataclass(section):
            of_section = dict(vars(section))
            values[name] = of_section | of_section.pop("options", {})
    return plain(values)
