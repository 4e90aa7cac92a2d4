"""Impossible configs: each is refused in one line that names the field."""

import dataclasses
import json
import math
from typing import Annotated, Literal

import pytest
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from configs import default, fashion_mnist, image_folder
from llvq.checkpointing import check_initial, check_resumable, from_saved
from llvq.config import TrainConfig, make_config, parse, to_dict
from llvq.errors import UserError
from llvq.fields import Integer, Several, flatten
from llvq.models import factory
from llvq.quantizers import QUANTIZERS, VQ, Entry
from llvq.train import num_train_steps
from llvq.training.objective import LOSSES
from llvq.training.optimizer import OPTIMIZERS
from tests import tiny


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shipped_configs_are_valid(quantizer):
    config = parse(fashion_mnist.get_config(quantizer))
    assert config.quantizer.name == quantizer
    # The paper recipe: 860 steps, and 4,300 for vq_ema, of which 860 with gradients.
    steps = num_train_steps(config, 55_000)
    assert (steps, config.schedule) == (
        (4300, "first_epoch") if quantizer == "vq_ema" else (860, "constant")
    )
    activations = "latent_activation", "output_activation"
    assert {config.model.options[name] for name in activations} == {"leaky_relu"}
    standard = parse(fashion_mnist.get_config(f"{quantizer},standard"))
    assert (num_train_steps(standard, 55_000), standard.schedule) == (8600, "cosine")
    assert {standard.model.options[name] for name in activations} == {"none"}
    restarts = standard.quantizer.options.get("restart_threshold", 0)
    assert (restarts > 0) == (quantizer in ("vq", "vq_ema", "residual_vq"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("xvq", r"unknown quantizer 'xvq' .*: choose one of vq, vq_ema, "),
        ("vq,longest", r"unknown recipe 'longest': choose one of paper, standard"),
        ("vq,papr", r"unknown recipe 'papr' \(did you mean paper\?\)"),
        ("vq,paper,x", r"the config argument 'vq,paper,x' must be QUANTIZER,RECIPE"),
        ("vq,model=vit", r"unknown config.model.name 'vit': choose one of paper"),
        ("vq,optimizer=adm", r"unknown config.optimizer.name 'adm' \(did you mean adam\?\)"),
        ("vq,loss=l1", r"must be QUANTIZER,RECIPE"),
    ],
)
def test_unknown_config_arguments(argument, message):
    with pytest.raises(UserError, match=message):
        default.get_config(argument)


def test_no_argument_is_the_sparse_lattice():
    assert fashion_mnist.get_config() == fashion_mnist.get_config("sparse_lattice,paper")
    folder = image_folder.get_config()
    assert folder == image_folder.get_config("sparse_lattice,standard,64")


def test_the_argument_names_an_optimizer_and_its_options_are_fields():
    config = fashion_mnist.get_config("vq,standard,optimizer=adamw")
    config.update_from_flattened_dict({"optimizer.weight_decay": 0.25, "loss.l1": 0.5})
    parsed = parse(config)
    assert parsed.optimizer.name == "adamw"
    assert parsed.optimizer.options["weight_decay"] == 0.25
    assert parsed.loss == {"mse": 1.0, "l1": 0.5, "ssim": 0.0, "quantizer": 1.0}


def test_a_renamed_optimizers_missing_options_have_their_defaults():
    config = fashion_mnist.get_config("vq")
    config.optimizer.name = "adamw"
    assert parse(config).optimizer.options["weight_decay"] == 1e-4
    config.optimizer.name = "lion"  # which has no eps
    with pytest.raises(
        UserError, match=r"config\.optimizer\.eps is not an option of lion.*takes b1"
    ):
        parse(config)


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
    ("model.output_activation", ""),
    ("loss.mse", -1.0),
    ("loss.quantizer", "1"),
    ("loss", 1.0),
    ("loss_options", {"mse": {"power": 2}}),
    ("optimizer.clip_norm", -1.0),
    ("optimizer.accumulate_steps", 0),
    ("optimizer.accumulate_steps", 3),  # no divisor of 16
    ("optimizer.ema_decay", 1.0),
    ("optimizer.b1", 1.0),
    ("optimizer.name", "adamm"),
    ("task", "gan"),
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
    assert str(error.value).startswith(("config.", "unknown config."))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_lattice_options():
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"config\.quantizer\.gamma"):
            parse(tiny.config("sparse_lattice", **{"quantizer.gamma": value}))
    with pytest.raises(UserError, match=r"decay.*dense_lattice.* takes gamma, commitment_cost"):
        parse(tiny.config("dense_lattice", **{"quantizer.decay": 0.9}))


def test_an_unknown_option_is_named():
    with pytest.raises(
        UserError, match=r"config\.quantizer\.level is not an option of fsq \(did you mean levels"
    ):
        make_config("fsq", quantizer={"level": (8, 5)}, image_shape=(12, 12, 1))


def test_a_quantizer_is_not_turned_into_another_by_its_name():
    config = tiny.config("sparse_lattice", **{"quantizer.name": "vq"})
    with pytest.raises(UserError, match=r"config\.quantizer\.gamma is not an option of vq"):
        parse(config)


@pytest.mark.parametrize("field", ["seed", "model.latent_dim", "dataset"])
def test_missing_fields_have_their_defaults(field):
    config = tiny.config("vq_ema")
    *path, name = field.split(".")
    del (config[path[0]] if path else config)[name]
    defaults = flatten(to_dict(make_config("vq_ema", image_shape=(12, 12, 1))))
    for key, value in flatten(to_dict(parse(config))).items():
        given = flatten(to_dict(parse(tiny.config("vq_ema"))))
        expected = defaults[key] if key.startswith(field) else given[key]
        assert value == expected


def test_make_config_fills_in_options():
    shape = {"image_shape": (12, 12, 1)}
    config = make_config("vq_ema", quantizer={"decay": 0.5}, latent_dim=8, **shape)
    whole = make_config("vq_ema", **shape).quantizer.options
    assert config.quantizer.options == {**whole, "decay": 0.5}
    assert config.model.latent_dim == 8
    config = make_config(
        "vq", model={"hidden_dims": (4,)}, optimizer="lion", learning_rate=0.0, **shape
    )
    assert (config.model.options["hidden_dims"], config.optimizer.name) == ((4,), "lion")
    for wrong, message in (
        ({"sede": 1}, r"config\.model\.sede is not an option of paper"),
        ({"lerning_rate": 1}, r"lerning_rate"),
        ({"hidden_dims": 64}, r"config\.model\.hidden_dims=64: must be one or more values"),
        ({"image_shape": (1, 28, 28)}, r"config\.model\.image_shape=\(1, 28, 28\)"),
        ({"image_shape": (12, 12)}, r"config\.model\.image_shape=\(12, 12\): must be 3 values"),
    ):
        with pytest.raises(UserError, match=message):
            make_config("vq", **{**shape, **wrong})


def test_an_image_shape_has_to_be_given():
    with pytest.raises(UserError, match=r"config.model.image_shape=\(0, 0, 0\): must be"):
        make_config("vq")


@pytest.mark.parametrize("field", ["sede", "model.latent_dims", "dataset.dir"])
def test_unknown_fields_are_named(field):
    with pytest.raises(UserError, match=rf"config\.{field} is not an? (field|option)"):
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
    assert to_dict(parsed) == plain


def test_num_train_steps_wins_over_epochs():
    assert num_train_steps(parse(tiny.config("vq", num_train_steps=7)), 70) == 7
    config = parse(tiny.config("vq", num_train_steps=0, num_epochs=3))
    assert num_train_steps(config, 70) == 15  # 3 epochs of ceil(70 / 16) steps


class Odd(VQ):
    """With an option of every kind."""

    def __init__(
        self,
        latent_dim: int,
        *,
        levels: Annotated[tuple[int, ...], Several(Integer(2))] = (8, 5),
        distance: Literal["euclidean", "cosine"] = "euclidean",
        is_rotated: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(latent_dim, param_dtype=param_dtype, rngs=rngs)
        self.given = levels, distance, is_rotated


@pytest.fixture
def _odd(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "odd", Entry(Odd))


@pytest.mark.usefixtures("_odd")
def test_options_may_be_tuples_texts_and_booleans():
    given = {"levels": (4, 4), "distance": "cosine", "is_rotated": True}
    config = parse(ConfigDict({**tiny.config("odd"), "quantizer": {"name": "odd", **given}}))
    model = factory.create_model(config.architecture, seed=0)
    assert model.quantizer.given == ((4, 4), "cosine", True)
    saved = from_saved(json.loads(json.dumps(to_dict(config))))
    assert saved == config
    default = parse(tiny.config("odd"))
    model = factory.create_model(default.architecture, seed=0)
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


def test_losses_and_optimizers_of_ones_own_are_fields(monkeypatch):
    def power(pair, *, power: Annotated[float, Integer(1)] = 2):
        return jnp.mean(jnp.abs(pair.reconstructions - pair.targets) ** power, axis=(1, 2, 3))

    monkeypatch.setitem(LOSSES, "power", power)
    monkeypatch.setitem(OPTIMIZERS, "mine", OPTIMIZERS["sgd"])
    config = fashion_mnist.get_config("vq,paper,optimizer=mine")
    config.update_from_flattened_dict({"loss.power": 0.5, "loss_options.power.power": 4})
    parsed = parse(config)
    assert (parsed.loss["power"], parsed.loss_options) == (0.5, {"power": {"power": 4}})
    assert parsed.optimizer.options == {"momentum": 0.9}
    assert parse(json.loads(json.dumps(to_dict(parsed)))) == parsed


@pytest.mark.parametrize("size", image_folder.SIZES)
def test_image_folder_has_a_network_for_each_size(size):
    config = parse(image_folder.get_config(f"vq,paper,{size}"))
    assert config.model.image_shape == (size, size, 3)
    assert config.dataset.fit == "resize"
    assert config.dataset.flip


def test_image_folder_names_the_sizes():
    assert parse(image_folder.get_config("vq")).model.image_shape == (64, 64, 3)
    with pytest.raises(UserError, match="size '65': choose one of 64, 128, 256, 512, 1024"):
        image_folder.get_config("vq,standard,65")


def test_a_run_keeps_its_images():
    config = parse(image_folder.get_config("vq"))
    saved = from_saved(json.loads(json.dumps(to_dict(config))))
    check_resumable(config, saved, "here")
    tiles = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, fit="tiles"))
    with pytest.raises(UserError, match=r"dataset\.fit='resize', not 'tiles'"):
        check_resumable(tiles, saved, "here")


@pytest.mark.parametrize(
    ("quantizer", "option", "value", "accepted"),
    [
        ("sparse_lattice", "gamma", 0.5, True),
        ("vq_ema", "decay", 0.5, True),
        ("vq_ema", "epsilon", 1e-4, True),
        ("e8_lattice", "rate_weight", 0.5, True),
        ("vq", "codebook_size", 8, False),
        ("vq", "restart_threshold", 0.1, False),
    ],
)
def test_a_run_may_start_from_parameters_that_fit(quantizer, option, value, accepted):
    saved = from_saved(json.loads(json.dumps(tiny.config(quantizer))))
    config = tiny.config(quantizer, **{f"quantizer.{option}": value})
    if accepted:
        check_initial(parse(config), saved, "here")
    else:
        with pytest.raises(UserError, match=r"here does not fit: quantizer\."):
            check_initial(parse(config), saved, "here")


def test_an_older_config_agrees_with_its_run():
    """As version 0.1 wrote it: fewer fields, and `derived` beside what the user had asked for."""
    config = parse(tiny.config("vq"))
    old = json.loads(json.dumps(to_dict(config)))
    for field in ("init_from", "task", "loss", "loss_options", "optimizer"):
        del old[field]
    for field in ("name", "output_activation", "latent_activation"):
        del old["model"][field]
    old |= {"images_per_device": 2, "batch_size": 8, "derived": {"batch_size": 16}}
    assert from_saved(old) == config
    check_resumable(config, from_saved(old), "here")
    other = dataclasses.replace(config, init_from="elsewhere")
    with pytest.raises(UserError, match="init_from='', not 'elsewhere'"):
        check_resumable(other, from_saved(old), "here")


@pytest.mark.parametrize(
    ("section", "registry"), [("model", "NETWORKS"), ("quantizer", "QUANTIZERS")]
)
def test_a_checkpoint_of_something_unregistered_says_what_to_register(section, registry):
    saved = json.loads(json.dumps(tiny.config("vq", **{f"{section}.name": "mine"})))
    with pytest.raises(UserError, match=rf"{section} is 'mine'.*{registry}\['mine'\]"):
        from_saved(saved)
