"""Batches that grow with the number of devices."""

import jax
import numpy as np
import pytest

from configs import celeba, default, fashion_mnist, ffhq1024
from llvq import checkpointing, evaluate, scaling, train
from llvq import config as configuration
from llvq.errors import UserError
from llvq.runtime import sharding
from results import collect
from tests import tiny


@pytest.mark.parametrize(
    ("num_devices", "rate", "decay", "intervals"),
    [
        (1, 0.25e-3, 0.99 ** (1 / 16), (800, 3440, 3440)),
        (16, 1e-3, 0.99, (50, 215, 215)),
        (64, 2e-3, 0.99**4, (12, 54, 54)),
        (16 * 2**12, 64e-3, 0.99**4096, (1, 1, 1)),
    ],
)
def test_what_goes_with_the_batch(num_devices, rate, decay, intervals):
    config = fashion_mnist.get_config("vq_ema,pod")
    config.images_per_device = 4  # of which 16 devices take the 64 of the recipe
    scaled = scaling.scale(config, num_devices, None)
    assert (scaled["batch_size"], scaled["images_per_device"]) == (4 * num_devices, 0)
    np.testing.assert_allclose(
        (scaled["learning_rate"], scaled["quantizer"]["decay"]), (rate, decay), rtol=1e-12
    )
    names = ("log_every_steps", "eval_every_steps", "checkpoint_every_steps")
    assert tuple(scaled[name] for name in names) == intervals
    untouched = {"batch_size", "images_per_device", "learning_rate", "quantizer.decay", *names}
    before, after = configuration.flatten(config), configuration.flatten(scaled)
    assert {name for name in before if before[name] != after[name]} <= untouched


@pytest.mark.parametrize("module", [fashion_mnist, celeba, ffhq1024])
@pytest.mark.parametrize("recipe", default.RECIPES)
def test_only_the_pod_recipe_grows(module, recipe):
    config = module.get_config(f"sparse_lattice,{recipe}")
    configuration.validate(config)
    assert (scaling.scale(config, 256, None) is config) == (recipe != "pod")
    expected = 2048 if recipe == "pod" else config.batch_size
    assert scaling.global_batch_size(config, 256) == expected


def test_a_run_keeps_its_batch_on_other_devices(tmp_path, monkeypatch):
    """As the run with the plain config that the rule leads to; and it can be evaluated."""
    config = tiny.config("vq_ema", images_per_device=4, batch_size=8)  # 4 times 8 devices
    data = tiny.dataset()
    plain = tiny.config(
        "vq_ema",
        batch_size=32,
        learning_rate=2e-3,
        **{f"{what}_every_steps": 1 for what in ("log", "eval", "checkpoint")},
        **{"quantizer.decay": 0.99**4},
    )
    expected = train.train_and_evaluate(plain, tmp_path / "plain", data)

    train.train_and_evaluate({**config, "num_train_steps": 3}, tmp_path / "pod", data)
    saved, _ = checkpointing.load(tmp_path / "pod")
    assert saved == {**configuration.to_plain(plain), "num_train_steps": 3}
    # The rest on four devices, where the config by itself would make batches of 16.
    four = jax.devices()[:4]
    mesh_for_batches = sharding.mesh_for_batches
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(
        sharding, "mesh_for_batches", lambda *sizes: mesh_for_batches(*sizes, devices=four)
    )
    state = train.train_and_evaluate(config, tmp_path / "pod", data)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        # Sums in another order, over six steps: by the tensor, as between any two meshes.
        difference = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert difference <= 1e-4 * np.linalg.norm(theirs)
    results = evaluate.evaluate(config, tmp_path / "pod", data)
    assert results["step"] == 6


def test_images_per_device_must_be_an_integer_from_0():
    for value in (-1, 1.5, True):
        with pytest.raises(UserError, match="images_per_device"):
            configuration.validate(tiny.config("vq", images_per_device=value))


@pytest.mark.parametrize("num_devices", [1, 16, 256])
def test_a_run_of_the_pod_recipe_is_known_by_its_config(num_devices):
    config = fashion_mnist.get_config("vq_ema,pod")
    assert collect.recipe_of(scaling.scale(config, num_devices, None)) == "pod"
