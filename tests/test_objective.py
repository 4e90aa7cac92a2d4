"""Losses, optimizers and what surrounds them, against NumPy, PyTorch and optax."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import checkpointing, evaluate, export, load_pretrained, pretrained, train
from llvq.data import order
from llvq.errors import UserError
from llvq.models import factory
from llvq.quantizers import VQ
from llvq.training.objective import Objective, default_weights
from tests import tiny
from tests.runs import assert_identical, create_model, leaves
from tests.test_metrics import float64_ssim


def model_and_images():
    model = tiny.paper_model(VQ(8, rngs=nnx.Rngs(0)), hidden_dims=(8,), value_range=(-0.5, 0.5))
    return model, tiny.images(5)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"mse": 0.0, "l1": 1.0},
        {"mse": 0.5, "l1": 0.25, "ssim": 2.0, "quantizer": 0.1},
        {"quantizer": 0.0},
    ],
)
def test_the_objective_is_the_weighted_sum(weights):
    model, images = model_and_images()
    weights = default_weights() | weights
    mask = np.array([True, True, False, True, False])
    loss, metrics, _ = Objective(weights)(model, images, mask=mask)
    scaled = images[mask] / 255 - 0.5
    outputs, codes, *_ = model(images)
    outputs = np.asarray(outputs, np.float64)[mask]
    error = outputs - scaled
    parts = {
        "mse": np.mean(error**2),
        "l1": np.mean(np.abs(error)),
        "ssim": 1 - np.mean(float64_ssim(scaled + 0.5, outputs + 0.5)),
    }
    latents = np.asarray(model.encoder(images / np.float32(255) - np.float32(0.5)), np.float64)
    chosen = np.asarray(model.quantizer.codebook[...], np.float64)[np.asarray(codes)]
    quantizer_loss = 1.25 * np.mean((latents - chosen)[mask] ** 2)
    expected = sum(weights[name] * part for name, part in parts.items())
    assert float(metrics["reconstruction_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["quantizer_loss"]) == pytest.approx(quantizer_loss, rel=1e-5)
    total = expected + weights["quantizer"] * quantizer_loss
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    own = {f"{name}_loss" for name in parts if weights[name]}
    assert {name for name in metrics if name in ("mse_loss", "l1_loss", "ssim_loss")} == (
        own if len(own) > 1 else set()
    )


def test_training_and_evaluation_report_one_objective(tmp_path):
    data = tiny.dataset()
    config = tiny.config("sparse_lattice", **{"loss.l1": 0.5, "loss.quantizer": 0.1})
    train.train_and_evaluate(config, tmp_path, data)
    results = evaluate.evaluate(tmp_path, data)
    model = checkpointing.model_of(checkpointing.load(tmp_path))
    images = tiny.images(19, 2)
    error = np.asarray(model.reconstruct(images), np.float64) - (images / 255 - 0.5)
    expected = np.mean(error**2) + 0.5 * np.mean(np.abs(error))
    assert results["reconstruction_loss"] == pytest.approx(expected, rel=1e-5)
    assert results["mse"] == pytest.approx(np.mean(error**2), rel=1e-5)
    total = expected + 0.1 * results["quantizer_loss"]
    assert results["loss"] == pytest.approx(total, rel=1e-5)


def steps_by_hand(config, optimizer, num_steps, parts=1):
    """(params, params after each step) of a loop over the model, unjitted and unsharded."""
    graphdef, params, statistics = factory.split(create_model(config))
    opt_state, history = optimizer.init(params), []
    batches = tiny.dataset().batches("train", order.training_batches(70, 16, seed=3))

    @jax.jit
    def gradient(params, images):
        def loss(params):
            model = nnx.merge(graphdef, params, statistics)
            targets = images / np.float32(255) - np.float32(0.5)
            output = model.quantizer(model.encoder(targets))
            return jnp.mean((model.decoder(output.quantized) - targets) ** 2) + output.loss

        return jax.grad(loss)(params)

    for _, (_, images) in zip(range(num_steps), batches, strict=False):
        of_parts = [gradient(params, images[part::parts]) for part in range(parts)]
        grads = jax.tree.map(lambda *leaves: sum(leaves) / parts, *of_parts)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return params, history


def assert_near(ours, theirs):
    """As float32 sums in another order differ, over a few steps."""
    theirs = leaves(theirs)
    for name, value in leaves(ours).items():
        assert np.linalg.norm(value - theirs[name]) <= 1e-4 * np.linalg.norm(value), name


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"name": "adamw", "weight_decay": 0.1}, optax.adamw(1e-3, weight_decay=0.1)),
        ({"name": "lion"}, optax.lion(1e-3)),
        ({"name": "sgd", "momentum": 0.5}, optax.sgd(1e-3, 0.5)),
        (
            {"name": "sgd", "clip_norm": 1e-3},
            optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1e-3, 0.9)),
        ),
    ],
    ids=["adamw", "lion", "sgd", "clip_norm"],
)
def test_optimizers_are_optaxs(options, optimizer, tmp_path):
    config = {**tiny.config("vq", num_train_steps=3), "optimizer": options}
    state = train.train_and_evaluate(config, tmp_path, tiny.dataset())
    expected, _ = steps_by_hand(config, optimizer, 3)
    # Lion's updates are signs, which rounding turns where a gradient is next to 0.
    if options["name"] != "lion":
        assert_near(state.params, expected)
    moved = jax.tree.map(lambda a, b: float(jnp.mean(a != b)), state.params, expected)
    assert options["name"] != "lion" or max(jax.tree.leaves(moved)) < 1


def test_accumulated_gradients_are_the_batchs(tmp_path):
    config = tiny.config("sparse_lattice", num_train_steps=3)
    parts = {**config, "optimizer": {"accumulate_steps": 4}}
    state = train.train_and_evaluate(parts, tmp_path, tiny.dataset())
    expected, _ = steps_by_hand(config, optax.adam(1e-3), 3, parts=4)
    assert_near(state.params, expected)
    assert int(state.step) == 3


def test_weights_are_averaged_and_the_averages_are_what_counts(tmp_path, monkeypatch):
    data = tiny.dataset()
    config = {**tiny.config("vq"), "optimizer": {"ema_decay": 0.3}}
    shorter = {**config, "num_train_steps": 4}
    train.train_and_evaluate(shorter, tmp_path / "run", data)
    state = train.train_and_evaluate(config, tmp_path / "run", data)
    whole = train.train_and_evaluate(config, tmp_path / "whole", data)
    assert_identical(state, whole)

    _, history = steps_by_hand(config, optax.adam(1e-3), 6)
    averages = factory.split(create_model(config))[1]
    for step, params in enumerate(history):
        decay = min(0.3, (1 + step) / (10 + step))
        averages = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, averages, params)
    assert_near(state.averages, averages)

    loaded = checkpointing.load(tmp_path / "run").state
    assert_identical(loaded.params, state.averages)
    evaluate.evaluate(tmp_path / "run", data)
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/index.json").write_text("{}")
    export.export(tmp_path / "run", "none", "tiny/vq")
    _, params, _ = factory.split(load_pretrained("tiny/vq"))
    assert_identical(params, state.averages)
    with pytest.raises(UserError, match=r"optimizer\.ema_decay=0\.3, not 0\.0"):
        train.train_and_evaluate(tiny.config("vq"), tmp_path / "run", data)


def test_an_optimizer_of_ones_own(tmp_path):
    config = tiny.config("vq", num_train_steps=3)
    optimizer = optax.adagrad(0.1)
    state = train.train_and_evaluate(config, tmp_path, tiny.dataset(), optimizer=optimizer)
    expected, _ = steps_by_hand(config, optimizer, 3)
    assert_near(state.params, expected)
