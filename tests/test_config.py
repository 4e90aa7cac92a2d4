"""Impossible configs: each is refused in one line that names the field."""

import dataclasses
import json
import math
from typing import Annotated

import pytest
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from configs import celeba, default, fashion_mnist, ffhq1024, image_folder
from llvq import VectorQuantizer
from llvq.config import (
    RECIPES,
    TrainConfig,
    architecture_of,
    check_initial,
    check_resumable,
    check_same_model,
    derive,
    global_batch_size,
    make_config,
    num_train_steps,
    of_saved,
    parse,
    to_dict,
    to_saved,
)
from llvq.errors import UserError
from llvq.fields import Choice, Flag, Integer, Several, flatten
from llvq.quantizers import QUANTIZERS, default_options
from llvq.training import train_state
from tests import tiny


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shipped_configs_are_valid(quantizer):
    config = parse(fashion_mnist.get_config(quantizer))
    assert config.quantizer.name == quantizer
    # The paper recipe: DESIGN's 860 steps, and 4,300 for vq_ema, of which 860 with gradients.
    steps = num_train_steps(config, 55_000)
    assert (steps, config.schedule) == (
        (4300, "first_epoch") if quantizer == "vq_ema" else (860, "constant")
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("xvq", r"unknown quantizer 'xvq': choose one of vq, vq_ema, "),
        ("vq,longest", r"unknown recipe 'longest': choose one of paper"),
        ("vq,paper,x", r"unknown recipe 'paper,x'"),
    ],
)
def test_unknown_config_arguments(argument, message):
    with pytest.raises(UserError, match=message):
        default.get_config(argument)


def test_no_argument_is_the_sparse_lattice():
    assert fashion_mnist.get_config() == fashion_mnist.get_config("sparse_lattice,paper")


BAD = [
    *((field, value) for value in (0, -1, 2.5, True) for field in ("batch_size", "num_epochs")),
    ("keep_checkpoints", 0),
    ("steps_per_call", 0),
    ("log_every_steps", 0),
    ("eval_every_steps", -5),
    ("checkpoint_every_steps", 0),
    ("num_train_steps", -1),
    ("seed", -1),
    ("seed", 2**32),
    ("learning_rate", -1e-3),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("compute_dtype", "float16"),
    ("compute_dtype", "float64"),  # x64 is off
    ("schedule", "cosine?"),
    ("model.latent_dim", -1),
    ("model.latent_activation", "relu"),
    ("model.num_residual_blocks", -1),
    ("model.hidden_dims", ()),
    ("model.hidden_dims", (8, 0)),
    ("model.hidden_dims", (8, 8, 8)),  # 12 is no multiple of 8
    ("model.image_shape", (12, 12)),
    ("model.image_shape", (12, -12, 1)),
    ("model.image_shape", (13, 12, 1)),
    ("model.image_shape", (8, 8, 1)),
    ("model.value_range", (1.0, 0.0)),
    ("model.value_range", (0.0,)),
    ("model.value_range", (0.0, "b")),
    ("model.value_range", (0.0, math.inf)),
    ("quantizer.codebook_size", 1),
    ("quantizer.codebook_size", -512),
    ("quantizer.commitment_cost", -0.25),
    ("quantizer.decay", 1.0),
    ("quantizer.epsilon", 0.0),
    # Too large to be counted or held, or to be built in any time.
    ("batch_size", 10**12),
    ("num_train_steps", 2**31),
    ("model.num_residual_blocks", 10**9),
    ("model.hidden_dims", (10**9,)),
    ("model.latent_dim", 10**30),
    ("model.value_range", (0, 10**400)),
    ("quantizer.codebook_size", 10**400),
    ("quantizer.commitment_cost", 10**30),
    # Of another type, as a whole section on the command line or a dict may have it.
    ("batch_size", "64"),
    ("learning_rate", "fast"),
    ("schedule", ["constant"]),
    ("compute_dtype", None),
    ("dataset.name", 3),
    ("dataset.data_dir", None),
    ("dataset.manual_dir", "a\0b"),
    ("model.hidden_dims", 8),
    ("model.hidden_dims", (True,)),
    ("model.image_shape", "12×12"),
    ("model.value_range", None),
    ("quantizer.name", []),
    ("quantizer.decay", "0.99"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_impossible_values(field, value):
    config = tiny.config("vq_ema", **{field: value})
    with pytest.raises(UserError) as error:
        parse(config)
    name = "image_shape" if field == "model.hidden_dims" and value == (8, 8, 8) else field
    assert str(error.value).startswith("config.")
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_lattice_options():
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"config\.quantizer\.gamma"):
            parse(tiny.config("sparse_lattice", **{"quantizer.gamma": value}))
    with pytest.raises(UserError, match=r"decay.*dense_lattice takes gamma, commitment_cost"):
        parse(tiny.config("dense_lattice", **{"quantizer.decay": 0.9}))


def test_an_unknown_option_is_named():
    with pytest.raises(
        UserError, match=r"config\.quantizer\.level is no option: fsq takes levels;"
    ):
        parse(make_config("fsq", quantizer={"level": (8, 5)}, image_shape=(12, 12, 1)))


@pytest.mark.parametrize("ours", QUANTIZERS)
@pytest.mark.parametrize("theirs", QUANTIZERS)
def test_a_quantizer_is_not_turned_into_another_by_its_name(ours, theirs):
    config = tiny.config(ours, **{"quantizer.name": theirs, "model.latent_dim": 0})
    if default_options(ours).keys() == default_options(theirs).keys():
        parse(config)  # the lattices with a rate share their options
    else:
        with pytest.raises(UserError, match=rf"the config argument \(configs/….py:{theirs}\)"):
            parse(config)


@pytest.mark.parametrize("field", ["seed", "model.latent_dim", "dataset"])
def test_missing_fields_have_their_defaults(field):
    config = tiny.config("vq_ema")
    *path, name = field.split(".")
    del (config[path[0]] if path else config)[name]
    defaults = flatten(to_dict(parse(make_config("vq_ema", image_shape=(12, 12, 1)))))
    for key, value in flatten(to_dict(parse(config))).items():
        given = flatten(to_dict(parse(tiny.config("vq_ema"))))
        expected = defaults[key] if key.startswith(field) else given[key]
        assert value == expected


def test_make_config_fills_in_options():
    config = make_config("vq_ema", quantizer={"decay": 0.5}, latent_dim=8)
    assert config.quantizer.options == {**make_config("vq_ema").quantizer.options, "decay": 0.5}
    assert config.model.latent_dim == 8
    with pytest.raises(UserError, match="the config has the field sede, which"):
        make_config("vq", sede=1)
    with pytest.raises(UserError, match=r"fields of config\.model by their own names"):
        make_config("vq", model={"latent_dim": 8})


def test_an_image_shape_has_to_be_given():
    with pytest.raises(UserError, match=r"config.model.image_shape=\(0, 0, 0\): must be 3 values"):
        parse(make_config("vq"))


@pytest.mark.parametrize("field", ["sede", "model.latent_dims", "dataset.dir"])
def test_unknown_fields_are_named(field):
    with pytest.raises(UserError, match=f"the config has the field {field}, which"):
        parse(tiny.config("vq", **{field: 1}))


def test_more_steps_than_can_be_counted():
    config = parse(tiny.config("vq", num_train_steps=0, num_epochs=2**30))
    with pytest.raises(
        UserError, match=r"config\.num_epochs=1073741824: must be at most 429496729,"
    ):
        num_train_steps(config, 70)


def test_every_form_of_a_config_is_the_same():
    plain = tiny.config("vq")
    parsed = parse(plain)
    assert isinstance(parsed, TrainConfig)
    assert parse(ConfigDict(plain)) == parsed
    assert parse(parsed) == parsed
    assert parse(json.loads(json.dumps(to_dict(parsed)))) == parsed
    activation = {"model": {**plain["model"], "latent_activation": "leaky_relu"}}
    assert to_dict(parsed) == {**plain, **activation}  # which the quantizer decides
    assert flatten(to_dict(ConfigDict(plain)))["model.hidden_dims"] == (8,)


def test_num_train_steps_wins_over_epochs():
    assert num_train_steps(parse(tiny.config("vq", num_train_steps=7)), 70) == 7
    config = parse(tiny.config("vq", num_train_steps=0, num_epochs=3))
    assert num_train_steps(config, 70) == 15  # 3 epochs of ceil(70 / 16) steps


class Odd(VectorQuantizer):
    """With an option of every kind."""

    def __init__(
        self,
        latent_dim: int,
        *,
        levels: Annotated[tuple[int, ...], Several(Integer(2))] = (8, 5),
        distance: Annotated[str, Choice("euclidean", "cosine")] = "euclidean",
        is_rotated: Annotated[bool, Flag()] = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(latent_dim, param_dtype=param_dtype, rngs=rngs)
        self.given = levels, distance, is_rotated


@pytest.fixture
def _odd(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "odd", Odd)


@pytest.mark.usefixtures("_odd")
def test_options_may_be_tuples_texts_and_booleans():
    given = {"levels": (4, 4), "distance": "cosine", "is_rotated": True}
    config = parse(ConfigDict({**tiny.config("odd"), "quantizer": {"name": "odd", **given}}))
    model = train_state.create_model(config.architecture, seed=0)
    assert model.quantizer.given == ((4, 4), "cosine", True)
    saved = json.loads(json.dumps(to_saved(config, config)))
    model = train_state.create_model(architecture_of(saved), seed=0)
    assert model.quantizer.given == ((4, 4), "cosine", True)
    check_resumable(config, saved, "here")
    default = parse(tiny.config("odd"))
    model = train_state.create_model(default.architecture, seed=0)
    assert model.quantizer.given == ((8, 5), "euclidean", False)


@pytest.mark.usefixtures("_odd")
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("levels", (4, 1), "one or more values, each an integer from 2"),
        ("levels", (), "one or more values"),
        ("levels", "44", "one or more values"),
        ("distance", "cosin", "one of euclidean, cosine"),
        ("is_rotated", 1, "True or False"),
    ],
)
def test_impossible_options_of_other_kinds(option, value, expected):
    with pytest.raises(UserError, match=rf"config\.quantizer\.{option}=.*must be {expected}"):
        parse(tiny.config("odd", **{f"quantizer.{option}": value}))


@pytest.mark.parametrize(
    ("num_devices", "rate", "decay", "intervals"),
    [
        (1, 0.25e-3, 0.99 ** (1 / 16), (800, 3440, 3440)),
        (16, 1e-3, 0.99, (50, 215, 215)),
        # 12.5 and 53.75 steps, rounded to multiples of steps_per_call, which is 5.
        (64, 2e-3, 0.99**4, (10, 55, 55)),
        (16 * 2**12, 64e-3, 0.99**4096, (5, 5, 5)),
    ],
)
def test_what_goes_with_the_batch(num_devices, rate, decay, intervals):
    given = fashion_mnist.get_config("vq_ema,pod")
    given.images_per_device = 4  # 16 devices take the 64 of the recipe
    config = parse(given)
    derived = derive(config, num_devices)
    assert (derived.batch_size, derived.images_per_device) == (4 * num_devices, 0)
    assert derived.learning_rate == pytest.approx(rate, rel=1e-12)
    assert derived.quantizer.options["decay"] == pytest.approx(decay, rel=1e-12)
    names = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps")
    assert tuple(getattr(derived, name) for name in names) == intervals
    untouched = {"batch_size", "images_per_device", "learning_rate", "quantizer.decay", *names}
    before, after = flatten(to_dict(config)), flatten(to_dict(derived))
    assert {name for name in before if before[name] != after[name]} <= untouched


@pytest.mark.parametrize("module", [fashion_mnist, celeba, ffhq1024, image_folder])
@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_pod_recipe_grows(module, recipe):
    config = parse(module.get_config(f"sparse_lattice,{recipe}"))
    assert (derive(config, 256) is config) == (recipe != "pod")
    expected = 2048 if recipe == "pod" else config.batch_size
    assert global_batch_size(config, 256) == expected


@pytest.mark.parametrize("size", image_folder.SIZES)
def test_image_folder_has_a_network_for_each_size(size):
    config = parse(image_folder.get_config(f"vq,paper,{size}"))
    assert config.model.image_shape == (size, size, 3)
    assert config.dataset.fit == "resize"
    assert config.dataset.flip


def test_image_folder_names_the_sizes():
    assert parse(image_folder.get_config("vq")).model.image_shape == (64, 64, 3)
    with pytest.raises(UserError, match="size '65': choose one of 64, 128, 256, 512, 1024"):
        image_folder.get_config("vq,long,65")


def test_a_run_keeps_its_images():
    config = parse(image_folder.get_config("vq"))
    saved = json.loads(json.dumps(to_dict(config)))
    check_resumable(config, saved, "here")
    tiles = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, fit="tiles"))
    with pytest.raises(UserError, match=r"dataset\.fit='resize', not 'tiles'"):
        check_resumable(tiles, saved, "here")


def test_what_was_asked_for_is_saved_beside_what_was_derived():
    config = parse(tiny.config("vq_ema", images_per_device=4, batch_size=8))
    derived = derive(config, 8)
    saved = json.loads(json.dumps(to_saved(config, derived)))
    assert (saved["images_per_device"], saved["batch_size"]) == (4, 8)
    assert saved["derived"]["batch_size"] == 32
    assert of_saved(saved) == flatten(to_dict(derived))
    check_resumable(derived, saved, "here")
    check_same_model(config, saved, "here")
    with pytest.raises(UserError, match="batch_size=32, not 8"):
        check_resumable(config, saved, "here")


@pytest.mark.parametrize(
    ("quantizer", "option", "value", "accepted"),
    [
        ("sparse_lattice", "gamma", 0.5, True),
        ("vq_ema", "decay", 0.5, True),
        ("vq", "gradient", "rotation", True),
        ("e8_lattice", "rate_weight", 0.5, True),
        ("bsq", "entropy_weight", 0.5, True),
        ("vq", "codebook_size", 8, False),
        ("vq", "restart_threshold", 0.1, False),
        ("fsq", "levels", (4, 3, 2, 5, 3, 2, 8, 3), False),
        ("e8_lattice", "initial_step", 0.5, False),
    ],
)
def test_a_run_may_start_from_other_options_of_training(quantizer, option, value, accepted):
    saved = json.loads(json.dumps(to_dict(parse(tiny.config(quantizer)))))
    config = tiny.config(quantizer, **{f"quantizer.{option}": value})
    if accepted:
        check_initial(parse(config), saved, "here")
    else:
        with pytest.raises(UserError, match=rf"here holds a run with quantizer\.{option}="):
            check_initial(parse(config), saved, "here")


def test_a_config_from_before_this_schema_agrees_with_its_run():
    config = parse(tiny.config("vq"))
    old = json.loads(json.dumps(to_dict(config)))
    del old["init_from"]
    check_resumable(config, old, "here")
    other = dataclasses.replace(config, init_from="elsewhere")
    with pytest.raises(UserError, match="init_from='', not 'elsewhere'"):
        check_resumable(other, old, "here")
