"""The typed schema of a config: its fields with defaults and ranges, and what a run derives.

    config = make_config("sparse_lattice", image_shape=(28, 28, 1), num_train_steps=200)

Whatever takes a config takes a `TrainConfig`, an ml_collections.ConfigDict (as the files of
configs/ make it) or nested dicts; a field that is missing has its default. The options of each
quantizer, with their defaults and ranges, are parameters of its constructor (llvq/quantizers): a
config lists all of them or none.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from llvq import fields
from llvq.data.dataset import Dataset
from llvq.data.order import steps_per_epoch
from llvq.errors import UserError
from llvq.fields import Choice, Flag, Integer, Number, Several, Text, flatten, plain
from llvq.models.layers import ACTIVATIONS
from llvq.models.vqvae import NUM_RESIDUAL_BLOCKS
from llvq.quantizers import check_options, default_options
from llvq.quantizers.registry import QUANTIZERS, quantizer_class, resolve_latent_dim
from llvq.runtime.console import markdown_table

# compute_dtype: the dtype of the convolutions' arithmetic, and that of all parameters with it.
DTYPES: dict[str, tuple[DTypeLike, DTypeLike]] = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}
SCHEDULES = ("constant", "first_epoch", "cosine")  # see llvq/training/schedules.py

# After how many steps something is done: these fields are intervals.
INTERVALS = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps")

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
      convert: whether images with transparency or 16 bits are converted; if not, they are refused.
      skip_damaged: whether files that cannot be used are left out; if not, they are an error.
    """

    name: Annotated[str, Text()] = ""
    data_dir: Annotated[str, Text()] = ""
    manual_dir: Annotated[str, Text()] = ""
    fit: Annotated[str, Choice("", "resize", "tiles")] = ""
    flip: Annotated[bool, Flag()] = False
    convert: Annotated[bool, Flag()] = False
    skip_damaged: Annotated[bool, Flag()] = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      image_shape: of every image, (height, width, channels). It has no default.
      value_range: what pixel values 0 … 255 are mapped to.
      hidden_dims: the width of the network after each halving of the image.
      num_residual_blocks: in the encoder, and as many in the decoder.
      latent_dim: the number of entries of a latent vector; 0: as many as the quantizer needs.
      latent_activation: at the end of the encoder: leaky_relu, as in the paper, or none.
      output_activation: at the end of the decoder, likewise.
    """

    image_shape: Annotated[tuple[int, int, int], Several(Integer(1), 3)] = (0, 0, 0)
    value_range: Annotated[tuple[float, float], Several(Number(), 2)] = (0.0, 1.0)
    hidden_dims: Annotated[tuple[int, ...], Several(Integer(1, 2**16))] = (64,)
    num_residual_blocks: Annotated[int, Integer(0, 100)] = NUM_RESIDUAL_BLOCKS
    latent_dim: Annotated[int, Integer(0, 2**16)] = 0
    latent_activation: Annotated[str, Choice(*ACTIVATIONS)] = "none"
    output_activation: Annotated[str, Choice(*ACTIVATIONS)] = "none"


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """A quantizer by name, with the options that its constructor takes."""

    name: str = "sparse_lattice"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Architecture(NamedTuple):
    """The part of a config from which a model is made."""

    model: ModelConfig
    quantizer: QuantizerConfig
    compute_dtype: str


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      seed: of the initial parameters, the input order and what is random in training.
      batch_size: images per step, over all devices and hosts.
      images_per_device: if above 0, a step takes this many images on each device. batch_size then
        only says which batch the learning rate, the EMA decay and the intervals are meant for: see
        `derive`.
      num_epochs: the length of the run.
      num_train_steps: the length of the run in steps; if above 0, it wins over num_epochs.
      steps_per_call: steps in one call of the compiled program, if the data set is in memory; each
        device then holds all of it. Reduced to the largest divisor that also divides every
        interval, the run's length and the step it resumes at; 1 on a CPU.
      learning_rate: Adam's.
      compute_dtype: the dtype of the convolutions' arithmetic: float32, bfloat16 or float64.
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
    """

    seed: Annotated[int, Integer(0, 2**32 - 1)] = 0
    batch_size: Annotated[int, Integer(1, 2**20)] = 64
    images_per_device: Annotated[int, Integer(0, 2**20)] = 0
    num_epochs: Annotated[int, Integer(1)] = 1
    num_train_steps: Annotated[int, Integer(0)] = 0
    steps_per_call: Annotated[int, Integer(1, 2**20)] = 1
    learning_rate: Annotated[float, Number(0, 1e30)] = 1e-3
    compute_dtype: Annotated[str, Choice(*DTYPES)] = "float32"
    schedule: Annotated[str, Choice(*SCHEDULES)] = "constant"
    init_from: Annotated[str, Text()] = ""
    keep_checkpoints: Annotated[int, Integer(1)] = 2
    log_every_steps: Annotated[int, Integer(1)] = 50
    eval_every_steps: Annotated[int, Integer(1)] = 500
    checkpoint_every_steps: Annotated[int, Integer(1)] = 500
    stop_on_failed_save: Annotated[bool, Flag()] = True
    dataset: DatasetConfig = DatasetConfig()
    model: ModelConfig = ModelConfig()
    quantizer: QuantizerConfig = QuantizerConfig()

    @property
    def architecture(self) -> Architecture:
        """The part of the config from which its model is made."""
        return Architecture(self.model, self.quantizer, self.compute_dtype)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(height, width) of an image's latents."""
        height, width, _ = self.model.image_shape
        factor = 2 ** len(self.model.hidden_dims)
        return height // factor, width // factor


# A config as its user wrote it.
ConfigLike = TrainConfig | Mapping[str, Any]


def _paper(quantizer: str) -> dict[str, Any]:
    # The authors ran 5 epochs with a learning rate of exactly 0 from the second on. Only what is
    # learned without gradients notices those.
    network = {"latent_activation": "leaky_relu", "output_activation": "leaky_relu"}
    if quantizer_class(quantizer).learns_without_gradients:
        return {**network, "num_epochs": 5, "schedule": "first_epoch"}
    return {**network, "num_epochs": 1, "schedule": "constant"}


def _long(_: str) -> dict[str, Any]:
    return {"num_epochs": 10, "schedule": "cosine"}


def _pod(quantizer: str) -> dict[str, Any]:
    return {**_long(quantizer), "images_per_device": 8}


# The fields that a recipe sets for a quantizer.
RECIPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "paper": _paper,  # what the authors' released models were trained with
    "long": _long,  # ten epochs; the learning rate rises, then falls to 0
    "pod": _pod,  # the same with 8 images per device, however many devices there are
}


def make_config(quantizer_name: str, /, recipe: str = "paper", **overrides: Any) -> TrainConfig:
    """A config for a quantizer, by a recipe.

    Args:
      quantizer_name: of llvq.quantizers.QUANTIZERS.
      recipe: of RECIPES.
      **overrides: fields of `TrainConfig` and of `ModelConfig`, by their names. `dataset` takes a
        dict, `quantizer` a dict of options.

    Raises:
      UserError: if there is no such quantizer, recipe or field.
    """
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if "model" in overrides:
        raise UserError("make_config takes the fields of config.model by their own names")
    options = default_options(quantizer_name) | plain(overrides.pop("quantizer", {}))
    values = {**RECIPES[recipe](quantizer_name), **overrides}
    of_model = {field.name for field in dataclasses.fields(ModelConfig)} & values.keys()
    model = {name: values.pop(name) for name in of_model}
    values |= {
        "model": model,
        "quantizer": {**options, "name": quantizer_name},
    }
    return _build(TrainConfig, plain(values))


def _build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass from nested dicts, without a look at the values."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise UserError(f"the config has the field {prefix}{name}, which llvq/config.py lacks")
    built: dict[str, Any] = {}
    for name, value in values.items():
        section: Any = known[name].type
        if dataclasses.is_dataclass(section) and not isinstance(value, Mapping):
            raise UserError(f"config.{prefix}{name}={value!r}: must be a dict of fields")
        if section is QuantizerConfig:
            options = dict(value)
            quantizer = options.pop("name", QuantizerConfig.name)
            fields.require(isinstance(quantizer, str), "quantizer.name", quantizer, "a text")
            built[name] = QuantizerConfig(quantizer, options or default_options(quantizer))
        elif dataclasses.is_dataclass(section):
            built[name] = _build(section, value, f"{name}.")
        else:
            built[name] = value
    return kind(**built)


def require_x64(compute_dtype: str) -> None:
    """Raises UserError if JAX would take float32 instead of float64."""
    if compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("config.compute_dtype=float64: needs jax_enable_x64 (JAX_ENABLE_X64=1)")


def parse(config: ConfigLike) -> TrainConfig:
    """A config of any form as a `TrainConfig` that describes a possible run.

    Raises:
      UserError: if it does not; the message names the field.
    """
    parsed = _build(TrainConfig, {"quantizer": {}, **to_dict(config)})
    for section, prefix in ((parsed, ""), (parsed.dataset, "dataset."), (parsed.model, "model.")):
        fields.check(vars(section), fields.ranges(type(section)), prefix)
    check_options(parsed.quantizer.name, parsed.quantizer.options)
    require_x64(parsed.compute_dtype)
    model = parsed.model
    factor = 2 ** len(model.hidden_dims)
    fields.require(
        model.image_shape[0] % factor == 0 and model.image_shape[1] % factor == 0,
        "model.image_shape",
        model.image_shape,
        f"a multiple of {factor} in height and width, as {len(model.hidden_dims)} hidden_dims "
        "halve it",
    )
    fields.require(
        min(model.image_shape[:2]) >= _SMALLEST_IMAGE,
        "model.image_shape",
        model.image_shape,
        f"{_SMALLEST_IMAGE} or more high and wide (SSIM)",
    )
    fields.require(
        model.value_range[0] < model.value_range[1],
        "model.value_range",
        model.value_range,
        "two numbers, the lower one first",
    )
    return dataclasses.replace(parsed, model=_resolve(model, parsed.quantizer))


def _resolve(model: ModelConfig, quantizer: QuantizerConfig) -> ModelConfig:
    """Fills in a latent_dim that is left to the quantizer."""
    latent_dim = resolve_latent_dim(quantizer.name, quantizer.options, model.latent_dim)
    return dataclasses.replace(model, latent_dim=latent_dim)


def to_dict(config: ConfigLike) -> dict[str, Any]:
    """A config of any form as nested dicts, tuples and plain values."""
    if not isinstance(config, TrainConfig):
        return plain(config)
    quantizer = {"name": config.quantizer.name, **config.quantizer.options}
    return plain({**dataclasses.asdict(config), "quantizer": quantizer})


def to_markdown(config: ConfigLike) -> str:
    """A config as a Markdown table, a row for each field."""
    return markdown_table(
        ("field", "value"),
        [(name, str(value)) for name, value in flatten(to_dict(config)).items()],
    )


def num_train_steps(config: TrainConfig, num_images: int) -> int:
    """How many steps a run takes on so many training images.

    Raises:
      UserError: if there are too many to be counted.
    """
    per_epoch = steps_per_epoch(num_images, config.batch_size)
    num_steps = config.num_train_steps or config.num_epochs * per_epoch
    if num_steps > fields.LARGEST:
        raise UserError(
            f"config.num_epochs={config.num_epochs}: must be at most "
            f"{fields.LARGEST // per_epoch}, as an epoch has {per_epoch} steps"
        )
    return num_steps


def global_batch_size(config: TrainConfig, num_devices: int) -> int:
    """Images per step, over all devices and hosts."""
    return config.images_per_device * num_devices or config.batch_size


def derive(
    config: TrainConfig, num_devices: int, saved_batch_size: int | None = None
) -> TrainConfig:
    """The config that a run uses on so many devices, with nothing left to derive.

    Where images_per_device is above 0, a step takes k times the config's batch_size. A run then has
    1/k of the steps (num_train_steps, if given, stays as it is), and

      learning rate    × √k, Adam's rule (Malladi et al. 2022, arXiv 2205.10287)
      EMA decay        to the power of k: the EMA forgets as fast per image (Busbridge et al. 2023,
                       arXiv 2307.13813)
      intervals        1/k of the steps, rounded to multiples of steps_per_call where they are that
      warm-up          a share of the steps, so it takes as many images as before

    Args:
      config: as the user gave it.
      num_devices: over all hosts.
      saved_batch_size: batch size of the run being resumed, or None. A run keeps its batch size on
        whatever number of devices it resumes.
    """
    if not config.images_per_device:
        return config
    batch_size = saved_batch_size or global_batch_size(config, num_devices)
    factor = batch_size / config.batch_size
    unit = math.gcd(config.steps_per_call, *(getattr(config, name) for name in INTERVALS))
    intervals: dict[str, Any] = {
        name: unit * max(1, round(getattr(config, name) / factor / unit)) for name in INTERVALS
    }
    options = dict(config.quantizer.options)
    if "decay" in options:
        options["decay"] **= factor
    return dataclasses.replace(
        config,
        images_per_device=0,
        batch_size=batch_size,
        learning_rate=config.learning_rate * math.sqrt(factor),
        quantizer=dataclasses.replace(config.quantizer, options=options),
        **intervals,
    )


def to_saved(config: TrainConfig, derived: TrainConfig) -> dict[str, Any]:
    """The config that a checkpoint keeps: as the user gave it, and in `derived` what differs.

    Args:
      config: as the user gave it.
      derived: what the run uses.
    """
    asked, used = to_dict(config), flatten(to_dict(derived))
    differing = {name: used[name] for name, value in flatten(asked).items() if used[name] != value}
    return asked | ({"derived": differing} if differing else {})


def of_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the run of a checkpoint used, as one flat dict with dotted names."""
    values = completed(saved)
    derived = values.pop("derived", {})
    return flatten(values) | derived


# Where a saved config names no activation, an encoder ended in none for these quantizers.
_ONCE_WITHOUT_ACTIVATION = (
    *("fsq", "lfq", "bsq", "diagonal_lattice", "d4_lattice", "e8_lattice", "leech_lattice"),
    *("learned_lattice", "multirate_lattice"),
)


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config, completed with fields newer than the version that saved it.

    These are the last activations of encoder and decoder and the quantizer's newer options. The
    values reproduce what the older version did.
    """
    values = plain(saved)
    name = values.get("quantizer", {}).get("name")
    if name not in QUANTIZERS:
        return values
    of_quantizer = "none" if name in _ONCE_WITHOUT_ACTIVATION else "leaky_relu"
    model = {"output_activation": "leaky_relu", **values["model"]}
    model["latent_activation"] = model.get("latent_activation") or of_quantizer
    return {
        **values,
        "model": model,
        "quantizer": default_options(name) | values["quantizer"],
    }


def architecture_of(saved: Mapping[str, Any]) -> Architecture:
    """The part of a checkpoint's config from which its model is made.

    An imported checkpoint does not know its images' height, width and value range: they are None.

    Raises:
      UserError: if the config is impossible; the message names the field.
    """
    values = completed(saved)
    of_run = fields.ranges(TrainConfig)
    fields.check(values, {name: of_run[name] for name in of_run if name in values})
    model = {"image_shape": (None, None, 0), "value_range": None, **values["model"]}
    allowed = fields.ranges(ModelConfig)
    for name in ("hidden_dims", "num_residual_blocks", "latent_dim"):
        fields.check(model, {name: allowed[name]}, "model.")
    # The shape's other entries are None in an imported checkpoint.
    channels = Integer(1)
    fields.require(
        channels.accepts(model["image_shape"][-1]),
        "model.image_shape[-1]",
        model["image_shape"][-1],
        str(channels),
    )
    options = dict(values["quantizer"])
    quantizer = QuantizerConfig(options.pop("name"), options)
    return Architecture(
        _resolve(_build(ModelConfig, model, "model."), quantizer),
        quantizer,
        values["compute_dtype"],
    )


def check_data(config: TrainConfig, data: Dataset) -> None:
    """Raises UserError unless a data set has what training and evaluation need.

    That is the splits "train" and "validation", with images in them of the config's shape.
    """
    for split in ("train", "validation"):
        if not data.num_images.get(split):
            raise UserError(
                f"the data set has no images in a split {split!r} (its splits: "
                f"{', '.join(data.num_images)}): training and evaluation need one"
            )
    shape = tuple(data.image_shape)
    fields.require(
        config.model.image_shape == shape,
        "model.image_shape",
        config.model.image_shape,
        f"{shape}, the shape of the data set's images",
    )


# Options that change how a quantizer learns, and neither its parameters nor what they mean.
_OF_TRAINING = (
    "commitment_cost",
    "decay",
    "dropout",
    "entropy_weight",
    "gamma",
    "gradient",
    "rate_weight",
    "temperature",
    "training",
    "warmup",
)


def check_same_model(config: TrainConfig, saved: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the first field that differs, if `saved` describes another model.

    A field that an imported checkpoint does not know agrees with everything. The EMA decay matters
    in training only, and may have been derived.

    Args:
      config: of the model wanted.
      saved: a checkpoint's config.
      where: the checkpoint, for the message.
    """
    theirs = {name: value for name, value in of_saved(saved).items() if name != "quantizer.decay"}
    _check_same(config, theirs, ("dataset.name", "model", "quantizer"), where)


def check_initial(config: TrainConfig, saved: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the first field that differs, if a run cannot start from `saved`.

    The data set may differ, and so may options that only matter in training.

    Args:
      config: of the run.
      saved: the config of the checkpoint with the parameters.
      where: that checkpoint, for the message.
    """
    ignored = [f"quantizer.{name}" for name in _OF_TRAINING]
    theirs = {name: value for name, value in of_saved(saved).items() if name not in ignored}
    _check_same(config, theirs, ("model", "quantizer"), where)


def check_resumable(config: TrainConfig, saved: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the first field that differs, if `saved` is another run's config.

    Args:
      config: what the run would use; see `derive`.
      saved: a checkpoint's config.
      where: the workdir, for the message.
    """
    of_images = [f"dataset.{name}" for name in ("name", "fit", "flip", "convert", "skip_damaged")]
    names = (*of_images, "model", "quantizer", "seed", "batch_size", "init_from")
    _check_same(config, {"init_from": "", **of_saved(saved)}, names, where)


def _check_same(
    config: TrainConfig, theirs: Mapping[str, Any], names: tuple[str, ...], where: str
) -> None:
    ours = flatten(to_dict(config))
    # The most telling first.
    for field in sorted(theirs, key=lambda name: (not name.endswith(".name"), name)):
        matters = any(field == name or field.startswith(f"{name}.") for name in names)
        if matters and not _agree(ours.get(field), theirs[field]):
            raise UserError(
                f"{where} holds a run with {field}={theirs[field]!r}, not "
                f"{ours.get(field)!r}: use another directory, or the same {field}"
            )


def _agree(value: Any, saved: Any) -> bool:
    if isinstance(value, tuple) and isinstance(saved, tuple) and len(value) == len(saved):
        return all(map(_agree, value, saved))
    return saved is None or value == saved
