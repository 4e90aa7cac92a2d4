"""Training as a whole: resuming, devices, divergence, checkpoints kept, metrics written."""

import math
import re
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax import numpy as jnp

from llvq import checkpointing, evaluate, pretrained, pretrained_index, train
from llvq.data import ArrayDataset, order
from llvq.errors import DivergenceError, UserError
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training import feeding, schedules
from tests import tiny
from tests.runs import (
    Recorder,
    assert_identical,
    create_model,
    create_state,
    leaves,
    make_step,
    newest,
    run_steps,
)

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "quantizer",
    [
        "vq_ema",
        *(pytest.param(q, marks=SLOW) for q in (*tiny.PAPER, "residual_vq") if q != "vq_ema"),
    ],
)
def test_a_resumed_run_is_bit_identical(quantizer, tmp_path):
    """Stopped at step 4 and resumed to 6; and a finished run of 4 steps extended to 6."""
    data = tiny.dataset()
    whole = train.train_and_evaluate(tiny.config(quantizer), tmp_path / "whole", data)
    shorter = tiny.config(quantizer, num_train_steps=4)
    stopped = train.train_and_evaluate(shorter, tmp_path / "parts", data)
    assert int(stopped.step) == 4
    resumed = train.train_and_evaluate(tiny.config(quantizer), tmp_path / "parts", data)
    assert_identical(resumed, whole)
    assert int(resumed.step) == 6
    # And a third call finds nothing to do.
    again = train.train_and_evaluate(tiny.config(quantizer), tmp_path / "parts", data)
    assert_identical(again, whole)


RANDOM = {"quantizer.restart_threshold": 0.5, "quantizer.initialization": "batch"}


@SLOW
def test_a_resumed_run_draws_the_same(tmp_path):
    """vq, whose codebook gradients move and restarts replace."""
    data, config = tiny.dataset(), tiny.config("vq", **RANDOM)
    whole = train.train_and_evaluate(config, tmp_path / "whole", data)
    shorter = tiny.config("vq", num_train_steps=4, **RANDOM)
    train.train_and_evaluate(shorter, tmp_path / "parts", data)
    assert_identical(train.train_and_evaluate(config, tmp_path / "parts", data), whole)
    plain = train.train_and_evaluate(tiny.config("vq"), tmp_path / "plain", data)
    codebooks = [np.asarray(state.params["quantizer"]["codebook"]) for state in (whole, plain)]
    # Without restarts it is still near its start, within 1/512.
    assert np.abs(codebooks[0]).max() > 5 * np.abs(codebooks[1]).max()


# The dense lattice's basis moves towards 0 by the learning rate a step. Near 0 training is chaotic:
# the gradient of an entry b changes with b by Σ(z/b)², and rounding errors grow tenfold a step and
# more, in float64 as well. One seed keeps clear of 0 for 30 steps, the other does not.
SEED_CLEAR_OF_ZERO, SEED_NEAR_ZERO = 8, 2


def assert_devices_agree(quantizer, num_steps, seed, **overrides):
    with jax.enable_x64(True):
        one, eight = (
            run_steps(quantizer, n, num_steps, "float64", seed, **overrides) for n in (1, 8)
        )
    for name, value in one[-1].items():
        assert value.dtype == np.float64
        error = np.linalg.norm(value - eight[-1][name]) / np.linalg.norm(value)
        assert error < 1e-9, name
    bases = [np.abs(value) for name, value in one[-1].items() if "basis" in name]
    return min((basis.min() for basis in bases), default=None)


@pytest.mark.parametrize(
    "quantizer",
    [
        "vq_ema",
        *(
            pytest.param(q, marks=SLOW)
            for q in tiny.DISTINCT
            if q not in ("vq", "vq_ema", "dense_lattice")
        ),
    ],
)
def test_one_and_eight_devices_are_the_same_computation(quantizer):
    """In float64, where 30 steps do not amplify rounding into another argmin."""
    assert_devices_agree(quantizer, 30, SEED_NEAR_ZERO)


@pytest.mark.slow
def test_one_and_eight_devices_draw_the_same():
    assert_devices_agree("vq", 10, SEED_NEAR_ZERO, **RANDOM)
    assert_devices_agree("e8_lattice", 10, SEED_NEAR_ZERO, **{"quantizer.training": "noise"})


@pytest.mark.slow
def test_one_and_eight_devices_are_the_same_computation_dense_lattice():
    assert assert_devices_agree("dense_lattice", 30, SEED_CLEAR_OF_ZERO) > 1e-2
    assert assert_devices_agree("dense_lattice", 10, SEED_NEAR_ZERO) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq", "vq_ema", "residual_vq"])
def test_one_and_eight_devices_agree_at_first_in_float32(quantizer):
    one, eight = (run_steps(quantizer, n, 5, "float32") for n in (1, 8))
    for a, b in zip(one, eight, strict=True):
        for name, value in a.items():
            assert np.linalg.norm(value - b[name]) <= 1e-4 * np.linalg.norm(value), name


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    config = tiny.config("vq", batch_size=9)
    with pytest.raises(UserError, match=r"batch_size=9 does not divide by the 8 devices.*of 8"):
        train.train_and_evaluate(config, tmp_path, tiny.dataset())
    assert not list(tmp_path.iterdir())


def test_training_is_adam_on_the_sum_of_losses(tmp_path):
    """Two steps against a loop of optax's own over the model, unjitted and unsharded."""
    config = tiny.config("sparse_lattice", num_train_steps=2)
    data = tiny.dataset()
    state = train.train_and_evaluate(config, tmp_path, data)

    optimizer = optax.adam(1e-3)
    graphdef, params, _ = factory.split(create_model(config))
    opt_state = optimizer.init(params)
    batches = data.batches("train", order.training_batches(70, 16, seed=3))
    for _, (_, images) in zip(range(2), batches, strict=False):
        targets = images / np.float32(255) - np.float32(0.5)

        def loss(params, targets=targets):
            model = nnx.merge(graphdef, params, {})
            output = model.quantizer(model.encoder(targets))
            return jnp.mean((model.decoder(output.quantized) - targets) ** 2) + output.loss

        updates, opt_state = optimizer.update(jax.jit(jax.grad(loss))(params), opt_state)
        params = optax.apply_updates(params, updates)
    for name, value in leaves(params).items():
        ours = leaves(state.params)[name]
        assert np.linalg.norm(ours - value) <= 1e-4 * np.linalg.norm(value), name


@pytest.mark.slow
def test_where_the_learning_rate_is_zero_only_statistics_move(tmp_path):
    """vq_ema's later epochs: as the quantizer, tested on its own, moves on the same latents."""
    config = tiny.config(
        "vq_ema", schedule="first_epoch", num_train_steps=0, num_epochs=2, batch_size=32
    )
    data = tiny.dataset()  # 70 images: 3 steps an epoch
    first = train.train_and_evaluate({**config, "num_epochs": 1}, tmp_path / "first", data)
    both = train.train_and_evaluate(config, tmp_path / "both", data)
    assert (int(first.step), int(both.step)) == (3, 6)
    assert_identical(first.params, both.params)

    graphdef, _, _ = factory.split(create_model(config))
    model = nnx.merge(graphdef, first.params, first.statistics)
    batches = data.batches("train", order.training_batches(70, 32, seed=3, first_step=3))
    for _, (_, images) in zip(range(3), batches, strict=False):
        nnx.jit(lambda model, x: model(x, train=True))(model, images)
    for name, value in leaves(factory.split(model)[2]).items():
        ours = leaves(both.statistics)[name]
        assert np.linalg.norm(ours - value) <= 1e-4 * np.linalg.norm(value), name


def rates_of(schedule, num_steps):
    """The learning rate of each step, in float32."""
    return np.asarray(jax.vmap(lambda step: jnp.float32(schedule(step)))(jnp.arange(num_steps)))


def test_schedules():
    first_epoch = schedules.SCHEDULES["first_epoch"](1e-3, 860, 4300)
    rates = rates_of(first_epoch, 4300)
    assert np.all(rates[:860] == np.float32(1e-3))
    assert np.all(rates[860:] == 0)
    assert schedules.num_active_steps("first_epoch", 1e-3, 860, 4300) == 860
    assert schedules.num_active_steps("first_epoch", 1e-3, 860, 200) == 200
    assert schedules.num_active_steps("constant", 1e-3, 860, 4300) == 4300
    assert schedules.num_active_steps("constant", 0.0, 860, 4300) == 0
    assert np.all(rates_of(schedules.SCHEDULES["constant"](0.5, 860, 2000), 2000) == 0.5)


@pytest.mark.parametrize("num_steps", [1, 19, 20, 400])
def test_cosine_schedule(num_steps):
    rates = rates_of(schedules.SCHEDULES["cosine"](1e-3, 860, num_steps), num_steps)
    rise = math.ceil(num_steps / 20)
    steps = np.arange(num_steps)
    expected = np.where(
        steps < rise,
        (steps + 1) / rise,
        (1 + np.cos(np.pi * (steps - rise + 1) / (num_steps - rise + 1))) / 2,
    )
    # Float32 on one side; the last rates are small differences, so not relative to each.
    np.testing.assert_allclose(rates, 1e-3 * expected, atol=1e-9)
    assert np.all(rates > 0)
    assert schedules.num_active_steps("cosine", 1e-3, 860, num_steps) == num_steps


@pytest.mark.slow
def test_divergence_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    config = tiny.config("vq", num_train_steps=4)
    train.train_and_evaluate(config, tmp_path, tiny.dataset())
    checkpoint = tmp_path / "checkpoints" / "4"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    worse = tiny.config("vq", num_train_steps=30, learning_rate=1e30)
    with pytest.raises(DivergenceError, match=rf"step [567].*checkpoint is {checkpoint}$"):
        train.train_and_evaluate(worse, tmp_path, tiny.dataset())
    assert newest(tmp_path / "checkpoints") == 4
    assert before == {path: path.read_bytes() for path in before}
    # What is left can be gone on with.
    state = train.train_and_evaluate(tiny.config("vq"), tmp_path, tiny.dataset())
    assert int(state.step) == 6


def test_a_state_that_an_update_ruined_is_not_saved(tmp_path):
    """The loss of step 1 is fine, from before its update; what would be saved after it is not."""
    config = tiny.config("vq", learning_rate=1e30, checkpoint_every_steps=1, eval_every_steps=1)
    with pytest.raises(DivergenceError, match=r"after step 1: stopped; no checkpoint was saved"):
        train.train_and_evaluate(config, tmp_path, tiny.dataset())
    assert newest(tmp_path / "checkpoints") == 0


def test_divergence_before_any_checkpoint(tmp_path):
    config = tiny.config("vq", learning_rate=1e30, checkpoint_every_steps=100, num_train_steps=50)
    with pytest.raises(DivergenceError, match=r"no checkpoint was saved before it$"):
        train.train_and_evaluate(config, tmp_path, tiny.dataset())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"seed": 4}, r"seed=3, not 4"),
        ({"batch_size": 24}, r"batch_size=16, not 24"),
        ({"dataset.name": "other"}, r"dataset.name='tiny', not 'other'"),
        ({"model.hidden_dims": (4,)}, r"model.hidden_dims=\(8,\), not \(4,\)"),
        ({"quantizer.codebook_size": 256}, r"quantizer.codebook_size=512, not 256"),
    ],
)
def test_another_runs_workdir_is_refused(override, message, finished_run):
    before = sorted(finished_run.rglob("*"))
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(tiny.config("vq", **override), finished_run, tiny.dataset())
    assert sorted(finished_run.rglob("*")) == before


def test_another_quantizers_workdir_is_refused(finished_run):
    config = tiny.config("sparse_lattice")
    with pytest.raises(UserError, match=r"quantizer.name='vq', not 'sparse_lattice'"):
        train.train_and_evaluate(config, finished_run, tiny.dataset())


def test_lengths_and_intervals_may_change(finished_run):
    config = tiny.config("vq", log_every_steps=1, checkpoint_every_steps=5, keep_checkpoints=4)
    config["dataset"] = {**config["dataset"], "data_dir": "/elsewhere"}
    assert int(train.train_and_evaluate(config, finished_run, tiny.dataset()).step) == 6


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train.train_and_evaluate(tiny.config("vq"), workdir, tiny.dataset())
    return workdir


@pytest.mark.parametrize("restarts", [False, True])
def test_kept_are_the_newest_and_the_best_by_reconstruction_loss(restarts, tmp_path):
    config = tiny.config("vq")
    state = create_state(config)
    losses = [0.9, 0.1, 0.5, 0.2, None, 0.8, 0.7, None]
    steps = list(enumerate(losses, start=1))
    for part in (steps[:5], steps[5:]) if restarts else (steps,):
        with checkpointing.open_manager(tmp_path, 3, "reconstruction_loss") as manager:
            for step, loss in part:
                metrics = None if loss is None else {"reconstruction_loss": loss, "loss": -loss}
                checkpointing.save(manager, step, state, config, metrics)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 4, 6, 7, 8]


def test_nothing_is_compiled_after_the_first_evaluation(tmp_path):
    data, seen = tiny.dataset(), []

    class Watched:
        num_images, image_shape = data.num_images, data.image_shape

        def batches(self, split, index_batches):
            for number, batch in enumerate(data.batches(split, index_batches)):
                seen.append(number + 1 if split == "train" else split)
                yield batch

    def lowered(event, *_, **__):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            seen.append("lowered")

    jax.monitoring.register_event_duration_secs_listener(lowered)
    try:
        train.train_and_evaluate(tiny.config("vq_ema"), tmp_path, Watched())
    finally:
        jax.monitoring.unregister_event_duration_listener(lowered)
    # Evaluated and saved at 2, 4 and 6.
    assert "lowered" in seen[: seen.index(3)]
    assert "lowered" not in seen[seen.index(3) :]


def test_what_a_run_writes(tmp_path):
    parts = {
        "vq": {"codebook_loss", "commitment_loss"},
        "vq_ema": {"commitment_loss"},
        "sparse_lattice": {"codebook_loss", "commitment_loss", "basis_l1"},
    }
    for quantizer, own in parts.items():
        writer = Recorder()
        train.train_and_evaluate(
            tiny.config(quantizer),
            tmp_path / quantizer,
            tiny.dataset(),
            make_writer=lambda writer=writer: writer,
        )
        common = own | {"loss", "reconstruction_loss", "quantizer_loss"}
        common |= {"perplexity", "distinct_codes"}
        only_train = {"learning_rate", "gradient_norm", "steps_per_second", "images_per_second"}
        assert {name for name in writer.scalars if name.startswith("train/")} == {
            f"train/{name}" for name in common | only_train
        }
        assert {name for name in writer.scalars if name.startswith("validation/")} == {
            f"validation/{name}" for name in common | {"mse", "psnr", "ssim"}
        }
        assert re.search(r"compiled in \d+\.\d s", writer.texts[1]["start"])
        for values in writer.scalars.values():
            assert list(values) == [2, 4, 6]
            assert all(np.isfinite(value) for value in values.values())
        loss, *addends = (
            np.array(list(writer.scalars[f"train/{name}"].values()))
            for name in ("loss", "reconstruction_loss", "quantizer_loss")
        )
        np.testing.assert_allclose(loss, sum(addends), rtol=1e-5)
        histogram = "validation/basis" if "basis_l1" in own else "validation/codebook_usage"
        assert set(writer.histograms[6]) == {histogram}
        picture = writer.images[6]["validation/reconstructions"]
        assert picture.shape == (1, 2 * 12, 8 * 12, 1)
        assert "\n| seed | 3 |" in writer.texts[0]["config"]
        assert writer.hparams["quantizer.name"] == quantizer


def test_flips_reach_the_model_only_in_training(tmp_path):
    """With flips on, a batch of mirrored images trains to the same state as their originals do."""
    images = tiny.images(16)
    flip = next(order.training_batches(16, 16, seed=3))
    mirrored = images.copy()
    mirrored[flip.index[flip.flip]] = mirrored[flip.index[flip.flip]][:, :, ::-1]
    config = tiny.config("vq", num_train_steps=1)
    a = ArrayDataset(train=images, validation=images, flip=True)
    b = ArrayDataset(train=mirrored, validation=images)
    states = [
        train.train_and_evaluate(config, tmp_path / name, data)
        for name, data in (("a", a), ("b", b))
    ]
    assert_identical(*states)
    ((_, evaluated),) = a.batches("validation", order.evaluation_batches(16, 16))
    np.testing.assert_array_equal(evaluated, images)


@pytest.mark.slow
def test_after_a_change_of_schedule_the_rate_is_that_of_the_step(tmp_path):
    """Also after steps without a gradient: on the device, by how far parameters move, and logged.

    Adam's first update is the learning rate times the gradient's sign, as nearly as ε lets it.
    """
    data = tiny.dataset()
    config = tiny.config(
        "vq_ema",
        schedule="first_epoch",
        num_train_steps=8,
        log_every_steps=1,
        eval_every_steps=100,
        checkpoint_every_steps=100,
    )
    train.train_and_evaluate(config, tmp_path, data)  # an epoch has 5 steps

    config |= {"schedule": "cosine", "num_train_steps": 20}
    writer = Recorder()
    train.train_and_evaluate(config, tmp_path, data, make_writer=lambda: writer)
    rates = rates_of(schedules.SCHEDULES["cosine"](1e-3, 5, 20), 20)
    for step, rate in writer.scalars["train/learning_rate"].items():
        # Float32, of which the last rates of a cosine are small differences.
        assert rate == pytest.approx(rates[step - 1], abs=1e-9)
    assert list(writer.scalars["train/learning_rate"]) == list(range(9, 21))

    # On the device: one step from a fresh Adam at step 10.
    mesh = sharding.make_mesh(jax.devices()[:1])
    schedule = schedules.SCHEDULES["cosine"](1e-3, 5, 20)
    step = make_step(config, mesh, schedule)
    state = create_state(config).replace(step=np.int32(10))
    count = optax.ScaleByScheduleState(np.int32(10))
    state = state.replace(opt_state=(state.opt_state[0], count))
    before = leaves(state.params)
    after, metrics = step(state, tiny.images(16))
    assert float(metrics["learning_rate"]) == pytest.approx(rates[10], rel=1e-6)
    moved = max(np.abs(value - before[name]).max() for name, value in leaves(after.params).items())
    assert moved == pytest.approx(rates[10], rel=1e-3)


def test_the_weight_of_the_quantizers_loss_rises_as_the_quantizer_says(tmp_path):
    config = tiny.config(
        "diagonal_lattice",
        num_train_steps=10,
        log_every_steps=1,
        eval_every_steps=100,
        **{"quantizer.warmup": 0.4, "quantizer.rate_weight": 0.02},
    )
    writer = Recorder()
    train.train_and_evaluate(config, tmp_path, tiny.dataset(), make_writer=lambda: writer)
    logged = writer.scalars
    weights = list(logged["train/quantizer_loss_weight"].values())
    np.testing.assert_allclose(weights, [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1])
    rates = np.array(list(logged["train/rate"].values()))
    losses = list(logged["train/quantizer_loss"].values())
    np.testing.assert_allclose(losses, 0.02 * rates, rtol=1e-6)
    reconstruction_losses = np.array(list(logged["train/reconstruction_loss"].values()))
    totals = reconstruction_losses + weights * np.array(losses)
    np.testing.assert_allclose(list(logged["train/loss"].values()), totals, rtol=1e-6)


def test_a_missing_split_is_named_before_anything_is_done(tmp_path, finished_run):
    images = tiny.images(16)
    for splits, missing in (
        ({"train": images}, "validation"),
        ({"train": images, "validation": images[:0]}, "validation"),
        ({"validation": images}, "train"),
    ):
        with pytest.raises(UserError, match=rf"no images in a split '{missing}'"):
            train.train_and_evaluate(tiny.config("vq"), tmp_path / "run", ArrayDataset(**splits))
        with pytest.raises(UserError, match=rf"no images in a split '{missing}'"):
            evaluate.evaluate(finished_run, ArrayDataset(**splits))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["vq", "vq_ema"])
def test_a_run_may_start_from_a_models_parameters(quantizer, tmp_path):
    data, config = tiny.dataset(), tiny.config(quantizer)
    first = train.train_and_evaluate(config, tmp_path / "first", data)
    checkpointing.save_for_inference(tmp_path / "model", first, config)

    shutil.copytree(tmp_path / "model", tmp_path / "second/checkpoints/1")
    with pytest.raises(UserError, match=r"has no optimizer.*--config.init_from=/.*/checkpoints/1$"):
        train.train_and_evaluate(config, tmp_path / "second", data)

    for source in (tmp_path / "first", tmp_path / "model"):
        workdir = tmp_path / f"from_{source.name}"
        config = tiny.config(quantizer, init_from=str(source), seed=4)
        found = train.train_and_evaluate({**config, "num_train_steps": 1}, workdir, data)
        # The same step by hand, from these parameters and a fresh optimizer.
        mesh = sharding.make_mesh()
        step = make_step(config, mesh)
        state = create_state(config)
        state = state.replace(params=first.params, statistics=first.statistics)
        _, images = next(data.batches("train", order.training_batches(70, 16, seed=4)))
        expected, _ = step(sharding.replicate(state, mesh), sharding.to_devices(images, mesh))
        assert_identical(found, expected)
    # It resumes from its own checkpoints, not from that model, which it does not need any more.
    whole = train.train_and_evaluate(config, tmp_path / "whole", data)
    shutil.rmtree(source)
    resumed = train.train_and_evaluate(config, workdir, data)
    assert_identical(resumed, whole)


@pytest.mark.slow
def test_a_run_may_go_on_in_another_arithmetic(tmp_path):
    config = tiny.config("vq_ema")
    train.train_and_evaluate({**config, "num_train_steps": 3}, tmp_path, tiny.dataset())
    with jax.enable_x64(True):
        config = {**config, "compute_dtype": "float64"}
        state = train.train_and_evaluate(config, tmp_path, tiny.dataset())
    assert int(state.step) == 6
    of_model = state.params, state.statistics
    assert {leaf.dtype for leaf in jax.tree.leaves(of_model)} == {np.dtype(np.float64)}


def test_another_models_parameters_are_refused(tmp_path):
    train.train_and_evaluate(tiny.config("vq", num_train_steps=1), tmp_path / "vq", tiny.dataset())
    config = tiny.config("vq_ema", init_from=str(tmp_path / "vq"))
    with pytest.raises(UserError, match=r"init_from=.* has quantizer.name='vq'"):
        train.train_and_evaluate(config, tmp_path / "run", tiny.dataset())


def test_a_run_may_start_from_parameters_that_were_trained_with_other_options(tmp_path):
    data, config = tiny.dataset(), tiny.config("d4_lattice", num_train_steps=1)
    first = train.train_and_evaluate(config, tmp_path / "first", data)
    options = {"quantizer.rate_weight": 0.1, "quantizer.training": "mixed", "learning_rate": 1e-30}
    config = tiny.config(
        "d4_lattice", init_from=str(tmp_path / "first"), num_train_steps=1, **options
    )
    found = train.train_and_evaluate(config, tmp_path / "second", data)
    assert_identical(found.params, first.params)  # such a step is smaller than float32 can add


class Descent(struct.PyTreeNode):
    """The state of a model that is no VQ-VAE."""

    step: jax.Array
    weights: jax.Array


class DescentTask:
    """Gradient descent on ‖weights − 1‖², a step per call; see `train.Task`."""

    num_steps, images_per_step, ranking = 6, 1, "height"

    def __init__(self, state):
        self.state = state

    def describe(self):
        return "a parabola"

    def calls(self):
        for step in range(int(self.state.step) + 1, self.num_steps + 1):
            yield feeding.Call(step, 1, (), lambda: None)

    def step(self, state, call):
        loss = jnp.sum((state.weights - 1) ** 2)
        weights = state.weights - 0.2 * (state.weights - 1)
        return Descent(state.step + 1, weights), {"loss": loss, "learning_rate": jnp.float32(0.1)}

    def measure_batch(self, state, call):
        return {"loss": float(jnp.sum((state.weights - 1) ** 2))}

    def validate(self, state, is_time_to_stop):
        loss = float(jnp.sum((state.weights - 1) ** 2))
        return train.Validation({"height": loss}, {}, {})


def test_the_loop_trains_any_task(tmp_path):
    start = Descent(jnp.int32(0), jnp.zeros(3))
    mesh = sharding.make_mesh()

    def run(task):
        writer = Recorder()
        state = train.run(
            *(task, tmp_path, mesh, train.Intervals(2, 2, 2), {"task": "parabola"}, lambda: writer),
            keep_checkpoints=2,
            stop_on_failed_save=True,
        )
        return state, writer

    task = DescentTask(start)
    task.num_steps = 4
    run(task)
    configs = []

    def make_like(saved):
        configs.append(saved)
        return jax.eval_shape(lambda: start)

    found = checkpointing.resume(tmp_path, make_like)
    assert configs[0] == {"task": "parabola"}
    with pytest.raises(UserError, match="of the task 'parabola'"):
        checkpointing.load(tmp_path)
    state, writer = run(DescentTask(jax.device_put(found)))
    np.testing.assert_allclose(state.weights, np.full(3, 1 - 0.8**6), rtol=1e-6)  # closed form
    assert list(writer.scalars["train/loss"]) == [6]
    assert writer.scalars["validation/height"][6] == pytest.approx(3 * 0.8**12, rel=1e-5)


@pytest.mark.parametrize("seed", [2, 3])
def test_a_shipped_model_in_a_workdir_is_refused_with_the_way_out(seed, tmp_path):
    shutil.copytree(pretrained.DIRECTORY / "fashion_mnist/vq", tmp_path / "checkpoints/1")
    config = {**pretrained_index()["fashion_mnist/vq"]["config"], "seed": seed}
    data = ArrayDataset(
        **dict.fromkeys(("train", "validation"), np.zeros((64, 28, 28, 1), np.uint8))
    )
    with pytest.raises(UserError, match=r"has no optimizer.*--config.init_from=/.*/checkpoints/1$"):
        train.train_and_evaluate(config, tmp_path, data)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_mistyped_init_from_is_named_before_a_workdir_is_made(tmp_path):
    config = tiny.config("vq", init_from=str(tmp_path / "mistyped"))
    with pytest.raises(UserError, match=r"no checkpoint in .*/mistyped: .*--config.init_from"):
        train.train_and_evaluate(config, tmp_path / "run", tiny.dataset())
    assert not list(tmp_path.iterdir())
