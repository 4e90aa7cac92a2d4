"""Impossible configs: each is refused in one line that names the field."""

import math

import pytest
from ml_collections import ConfigDict

from configs import default, fashion_mnist
from llvq import config as configuration
from llvq.errors import UserError
from llvq.quantizers import QUANTIZERS
from tests import tiny


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shipped_configs_are_valid(quantizer):
    config = fashion_mnist.get_config(quantizer)
    configuration.validate(config)
    assert config.quantizer.name == quantizer
    # The paper recipe: DESIGN's 860 steps, and 4,300 for vq_ema, of which 860 with gradients.
    steps = configuration.num_train_steps(config, 55_000)
    assert (steps, config.schedule) == (
        (4300, "first_epoch") if quantizer == "vq_ema" else (860, "constant")
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fsq", r"unknown quantizer 'fsq': choose one of vq, vq_ema, "),
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
    ("model.latent_dim", 0),
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
        configuration.validate(config)
    name = "image_shape" if field == "model.hidden_dims" and value == (8, 8, 8) else field
    assert str(error.value).startswith("config.")
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_lattice_options():
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"config\.quantizer\.gamma"):
            configuration.validate(tiny.config("sparse_lattice", **{"quantizer.gamma": value}))
    with pytest.raises(UserError, match=r"decay.*dense_lattice takes name, gamma, commitment_cost"):
        configuration.validate(tiny.config("dense_lattice", **{"quantizer.decay": 0.9}))


@pytest.mark.parametrize("ours", QUANTIZERS)
@pytest.mark.parametrize("theirs", QUANTIZERS)
def test_a_quantizer_is_not_turned_into_another_by_its_name(ours, theirs):
    config = tiny.config(ours, **{"quantizer.name": theirs})
    if ours == theirs:
        configuration.validate(config)
    else:
        with pytest.raises(UserError, match=rf"the config argument \(configs/….py:{theirs}\)"):
            configuration.validate(config)


@pytest.mark.parametrize("field", ["seed", "model.latent_dim", "dataset.name", "quantizer.name"])
def test_missing_fields_are_named(field):
    config = tiny.config("vq")
    *path, name = field.split(".")
    del (config[path[0]] if path else config)[name]
    with pytest.raises(UserError, match=f"the config lacks {field}"):
        configuration.validate(config)


@pytest.mark.parametrize("field", ["sede", "model.latent_dims", "dataset.dir"])
def test_unknown_fields_are_named(field):
    with pytest.raises(UserError, match=f"the config has the field {field}, which"):
        configuration.validate(tiny.config("vq", **{field: 1}))


def test_more_steps_than_can_be_counted():
    config = tiny.config("vq", num_train_steps=0, num_epochs=2**30)
    with pytest.raises(
        UserError, match=r"config\.num_epochs=1073741824: must be at most 429496729,"
    ):
        configuration.num_train_steps(config, 70)


def test_config_dicts_and_plain_dicts_are_alike():
    plain = tiny.config("vq")
    config_dict = ConfigDict(plain)
    assert configuration.to_plain(config_dict) == configuration.to_plain(plain)
    assert configuration.flatten(config_dict)["model.hidden_dims"] == [8]
    configuration.check_resumable(config_dict, configuration.to_plain(plain), "here")


def test_num_train_steps_wins_over_epochs():
    assert configuration.num_train_steps(tiny.config("vq", num_train_steps=7), 70) == 7
    config = tiny.config("vq", num_train_steps=0, num_epochs=3)
    assert configuration.num_train_steps(config, 70) == 15  # 3 epochs of ceil(70 / 16) steps
