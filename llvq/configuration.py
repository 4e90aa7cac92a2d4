"""What a config must satisfy: by itself, and against the config of the run that it resumes.

A config is a nested mapping with the fields of configs/default.py: an ml_collections.ConfigDict
(which is no Mapping, only like one) or plain dicts.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax

from llvq.errors import UserError
from llvq.order import steps_per_epoch
from llvq.quantizers import default_options
from llvq.schedules import SCHEDULES
from llvq.train_state import DTYPES

Config = Mapping[str, Any]


_FIELDS = (
    *(
        "seed",
        "batch_size",
        "images_per_device",
        "num_epochs",
        "num_train_steps",
        "learning_rate",
        "schedule",
    ),
    *("compute_dtype", "keep_checkpoints", "log_every_steps", "eval_every_steps"),
    *("checkpoint_every_steps", "stop_on_failed_save", "dataset.name", "quantizer.name"),
    *("model.image_shape", "model.value_range", "model.hidden_dims", "model.num_residual_blocks"),
    "model.latent_dim",
)


def to_plain(config: Any) -> Any:
    """A config as JSON would give it back: plain dicts, lists and numbers."""
    if hasattr(config, "items"):
        return {key: to_plain(value) for key, value in sorted(config.items())}
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
    """How many steps a run takes: num_train_steps if given, else num_epochs."""
    per_epoch = steps_per_epoch(num_images, config["batch_size"])
    return config["num_train_steps"] or config["num_epochs"] * per_epoch


def latent_height(config: Config) -> int:
    """How many rows of latents an image has."""
    model = config["model"]
    return model["image_shape"][0] // 2 ** len(model["hidden_dims"])


def _require(condition: bool, field: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"config.{field}={value!r}: must be {expected}")


def _require_integer(config: Config, field: str, minimum: int) -> None:
    section: Any = config
    *path, name = field.split(".")
    for key in path:
        section = section[key]
    value = section[name]
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(valid, field, value, f"an integer ≥ {minimum}")


def validate(config: Config) -> None:
    """Raises UserError, naming the field, unless the config describes a possible run."""
    config = to_plain(config)
    for field in _FIELDS:
        section: Any = config
        for name in field.split("."):
            if not isinstance(section, dict) or name not in section:
                raise UserError(f"the config lacks {field}: configs/default.py lists every field")
            section = section[name]
    for field in (
        "batch_size",
        "num_epochs",
        "keep_checkpoints",
        "log_every_steps",
        "eval_every_steps",
        "checkpoint_every_steps",
        "model.latent_dim",
    ):
        _require_integer(config, field, 1)
    for field in ("seed", "images_per_device", "num_train_steps", "model.num_residual_blocks"):
        _require_integer(config, field, 0)
    stop = config["stop_on_failed_save"]
    _require(isinstance(stop, bool), "stop_on_failed_save", stop, "True or False")
    _require(config["seed"] < 2**32, "seed", config["seed"], "below 2**32")
    rate = config["learning_rate"]
    _require(0 <= rate < math.inf, "learning_rate", rate, "a finite number ≥ 0")
    for field, choices in (("compute_dtype", DTYPES), ("schedule", SCHEDULES)):
        _require(config[field] in choices, field, config[field], f"one of {', '.join(choices)}")
    _require(
        config["compute_dtype"] != "float64" or jax.config.read("jax_enable_x64"),
        "compute_dtype",
        "float64",
        "used with jax_enable_x64 (JAX_ENABLE_X64=1)",
    )
    _validate_model(config["model"])
    _validate_quantizer(config["quantizer"])


def _validate_model(model: Config) -> None:
    hidden_dims, image_shape = tuple(model["hidden_dims"]), tuple(model["image_shape"])
    for field, value, length in (
        ("hidden_dims", hidden_dims, None),
        ("image_shape", image_shape, 3),
    ):
        valid = all(isinstance(n, int) and n >= 1 for n in value)
        valid &= len(value) == length if length else len(value) > 0
        _require(valid, f"model.{field}", value, f"{length or 'one or more'} integers ≥ 1")
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
    value_range = tuple(model["value_range"])
    are_numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in value_range)
    _require(
        are_numbers and len(value_range) == 2 and value_range[0] < value_range[1],
        "model.value_range",
        value_range,
        "two numbers, the lower first",
    )


def _validate_quantizer(quantizer: Config) -> None:
    options = default_options(quantizer["name"])
    if set(quantizer) != {"name", *options}:
        raise UserError(
            f"config.quantizer has the fields {', '.join(sorted(quantizer))}, but "
            f"{quantizer['name']} takes name, {', '.join(options)}: name the quantizer in the "
            f"config argument (configs/….py:{quantizer['name']})"
        )
    if "codebook_size" in quantizer:
        _require_integer({"quantizer": quantizer}, "quantizer.codebook_size", 2)
    for option, valid, expected in (
        ("commitment_cost", lambda x: 0 <= x < math.inf, "a finite number ≥ 0"),
        ("gamma", math.isfinite, "a finite number"),
        ("decay", lambda x: 0 <= x < 1, "at least 0 and below 1"),
        ("epsilon", lambda x: 0 < x < math.inf, "a finite number above 0"),
    ):
        if option in quantizer:
            value = quantizer[option]
            _require(valid(value), f"quantizer.{option}", value, expected)


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
