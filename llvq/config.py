"""What a config must satisfy: by itself, and against the config of the run that it resumes.

A config is a nested mapping with the fields of configs/default.py: an ml_collections.ConfigDict
(which is no Mapping, only like one) or plain dicts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from llvq.data.order import steps_per_epoch
from llvq.errors import UserError
from llvq.quantizers import default_options
from llvq.training.schedules import SCHEDULES
from llvq.training.train_state import DTYPES

Config = Mapping[str, Any]

# In steps: how often something follows one.
INTERVALS = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps")

# The integers of a config with the smallest and the largest value of each. What is too large for
# a machine runs out of its memory and says so; the upper bounds, far above any use, keep sizes
# from overflowing before that, and steps within int32.
_LARGEST = 2**31 - 1
_INTEGERS = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, 2**20),
    "images_per_device": (0, 2**20),
    "num_epochs": (1, _LARGEST),
    "num_train_steps": (0, _LARGEST),
    "steps_per_call": (1, 2**20),
    "keep_checkpoints": (1, _LARGEST),
    **dict.fromkeys(INTERVALS, (1, _LARGEST)),
    "model.num_residual_blocks": (0, 100),
    "model.latent_dim": (1, 2**16),
}
_TEXTS = (
    *("schedule", "compute_dtype", "quantizer.name"),
    *("dataset.name", "dataset.data_dir", "dataset.manual_dir"),
)
_FIELDS = (
    *_INTEGERS,
    *_TEXTS,
    *(
        "learning_rate",
        "stop_on_failed_save",
        "model.image_shape",
        "model.value_range",
        "model.hidden_dims",
    ),
)


def to_plain(config: Any) -> Any:
    """A config as JSON would give it back: plain dicts, lists and numbers."""
    if hasattr(config, "items"):
        plain = {str(key): to_plain(value) for key, value in config.items()}
        return {key: plain[key] for key in sorted(plain)}
    return [to_plain(item) for item in config] if isinstance(config, list | tuple) else config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as one flat dict with dotted names, e.g. {"model.latent_dim": 64}."""
    flat: dict[str, Any] = {}
    for key, value in to_plain(config).items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def to_markdown(config: Config) -> str:
    """A config as a Markdown table, a row for each field."""
    rows = (f"| {name} | {value} |" for name, value in flatten(config).items())
    return "\n".join(("| field | value |", "| --- | --- |", *rows))


def num_train_steps(config: Config, num_images: int) -> int:
    """How many steps a run takes: num_train_steps if given, else num_epochs.

    Raises:
      UserError: if there are too many to be counted.
    """
    per_epoch = steps_per_epoch(num_images, config["batch_size"])
    num_steps = config["num_train_steps"] or config["num_epochs"] * per_epoch
    if num_steps > _LARGEST:
        raise UserError(
            f"config.num_epochs={config['num_epochs']}: must be at most {_LARGEST // per_epoch}, "
            f"as an epoch has {per_epoch} steps"
        )
    return num_steps


def latent_height(config: Config) -> int:
    """How many rows of latents an image has."""
    model = config["model"]
    return model["image_shape"][0] // 2 ** len(model["hidden_dims"])


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        found = repr(value)
        found = found if len(found) <= 100 else f"{found[:100]}…"
        raise UserError(f"config.{field}={found}: must be {expected}")


def _is_integer(value: Any, smallest: int, largest: int = _LARGEST) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and smallest <= value <= largest


def _is_number(value: Any) -> bool:
    """Whether it is one that float32 holds with room to calculate."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST


def validate(config: Config) -> None:
    """Raises UserError, naming the field, unless the config describes a possible run."""
    config = to_plain(config)
    _check_fields(config)
    for field in _INTEGERS:
        _check_integer(config, field)
    stop = config["stop_on_failed_save"]
    _require(isinstance(stop, bool), "stop_on_failed_save", stop, "True or False")
    rate = config["learning_rate"]
    valid = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1e30
    _require(valid, "learning_rate", rate, "a number from 0 to 1e30")
    for field in _TEXTS:
        value = _get(config, field)
        # "\0" is in no file's name.
        _require(isinstance(value, str) and "\0" not in value, field, value, "a text")
    for field, choices in (("compute_dtype", DTYPES), ("schedule", SCHEDULES)):
        value = config[field]
        _require(value in choices, field, value, f"one of {', '.join(choices)}")
    _require(
        config["compute_dtype"] != "float64" or jax.config.read("jax_enable_x64"),
        "compute_dtype",
        "float64",
        "used with jax_enable_x64 (JAX_ENABLE_X64=1)",
    )
    _check_hidden_dims(config)
    _validate_images(config["model"])
    _validate_quantizer(config["quantizer"])


def _get(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        try:
            value = value[name]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the config lacks {field}: configs/default.py lists every field"
            ) from error
    return value


def _check_integer(config: Config, field: str) -> None:
    value = _get(config, field)
    smallest, largest = _INTEGERS[field]
    valid = _is_integer(value, smallest, largest)
    _require(valid, field, value, f"an integer from {smallest} to {largest}")


def _check_fields(config: Config) -> None:
    """Exactly those of configs/default.py; which ones `quantizer` has depends on its name."""
    for field in _FIELDS:
        _get(config, field)
    for field in flatten(config):
        if field not in _FIELDS and not field.startswith("quantizer."):
            raise UserError(f"the config has the field {field}, which configs/default.py lacks")


def _check_hidden_dims(config: Config) -> None:
    hidden_dims = to_plain(_get(config, "model.hidden_dims"))
    valid = isinstance(hidden_dims, list) and hidden_dims != []
    valid = valid and all(_is_integer(width, 1, 2**16) for width in hidden_dims)
    _require(valid, "model.hidden_dims", hidden_dims, "one or more integers from 1 to 65536")


def check_saved(config: Config) -> None:
    """Raises UserError, naming the field, unless a checkpoint's config has sizes to work with.

    Those of the network, and those of the run, of which an imported checkpoint knows nothing.
    """
    fields = ["model.num_residual_blocks", "model.latent_dim"]
    if "num_epochs" in config:
        fields += ["batch_size", "num_epochs", "num_train_steps"]
    for field in fields:
        _check_integer(config, field)
    _check_hidden_dims(config)


def _validate_images(model: Config) -> None:
    hidden_dims, image_shape = model["hidden_dims"], model["image_shape"]
    valid = isinstance(image_shape, list) and len(image_shape) == 3
    valid = valid and all(_is_integer(size, 1) for size in image_shape)
    _require(valid, "model.image_shape", image_shape, "3 integers ≥ 1")
    factor = 2 ** len(hidden_dims)
    _require(
        image_shape[0] % factor == 0 and image_shape[1] % factor == 0,
        "model.image_shape",
        image_shape,
        f"a multiple of {factor} in height and width, as {len(hidden_dims)} hidden_dims halve it",
    )
    _require(
        min(image_shape[:2]) >= 11,
        "model.image_shape",
        image_shape,
        "11 or more high and wide (SSIM)",
    )
    value_range = model["value_range"]
    valid = isinstance(value_range, list) and len(value_range) == 2
    valid = valid and all(map(_is_number, value_range)) and value_range[0] < value_range[1]
    expected = f"two numbers within ±{_LARGEST}, the lower first"
    _require(valid, "model.value_range", value_range, expected)


def _validate_quantizer(quantizer: Config) -> None:
    options = default_options(quantizer["name"])
    if set(quantizer) != {"name", *options}:
        raise UserError(
            f"config.quantizer has the fields {', '.join(sorted(quantizer))}, but "
            f"{quantizer['name']} takes name, {', '.join(options)}: name the quantizer in the "
            f"config argument (configs/….py:{quantizer['name']})"
        )
    valid: dict[str, tuple[Callable[[Any], bool], str]] = {
        "codebook_size": (lambda x: _is_integer(x, 2, 2**24), f"an integer from 2 to {2**24}"),
        "commitment_cost": (lambda x: _is_number(x) and x >= 0, f"a number from 0 to {_LARGEST}"),
        "gamma": (_is_number, f"a number within ±{_LARGEST}"),
        "decay": (lambda x: _is_number(x) and 0 <= x < 1, "a number from 0 to below 1"),
        "epsilon": (lambda x: _is_number(x) and x > 0, f"a number above 0, up to {_LARGEST}"),
    }
    for option in options:
        is_valid, expected = valid[option]
        value = quantizer[option]
        _require(is_valid(value), f"quantizer.{option}", value, expected)


def check_image_shape(config: Config, image_shape: tuple[int, ...]) -> None:
    """Raises UserError unless the config's images are the data set's."""
    configured = tuple(config["model"]["image_shape"])
    _require(
        configured == image_shape, "model.image_shape", configured, f"{image_shape}, the data's"
    )


def check_same_model(config: Config, saved: Config, where: str) -> None:
    """Raises UserError, naming the first field that differs, if `saved` describes another model.

    What an imported checkpoint's config does not know, a field that is missing or None, agrees
    with everything. The EMA decay matters in training only, and may have been scaled.
    """
    known = {**flatten(saved), "quantizer.decay": None}
    _check_same(config, known, ("dataset.name", "model", "quantizer"), where)


def check_resumable(config: Config, saved: Config, where: str) -> None:
    """Raises UserError, naming the first field that differs, if `saved` is another run's config."""
    _check_same(config, saved, ("dataset.name", "model", "quantizer", "seed", "batch_size"), where)


def _check_same(config: Config, saved: Config, names: tuple[str, ...], where: str) -> None:
    ours, theirs = flatten(config), flatten(saved)
    # The most telling first.
    for field in sorted(theirs, key=lambda name: (not name.endswith(".name"), name)):
        matters = any(field == name or field.startswith(f"{name}.") for name in names)
        if matters and not _agree(ours.get(field), theirs[field]):
            raise UserError(
                f"{where} holds a run with {field}={theirs[field]!r}, not "
                f"{ours.get(field)!r}: use another directory, or the same {field}"
            )


def _agree(value: Any, saved: Any) -> bool:
    if isinstance(value, list) and isinstance(saved, list) and len(value) == len(saved):
        return all(map(_agree, value, saved))
    return saved is None or value == saved
