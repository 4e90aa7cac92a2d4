"""The method against what the authors' own program computed from their released weights.

Tensors are compared as a whole, by the norm of the difference over the norm of the reference:
single elements near 0 differ more, as float32 sums in another order do.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import import_torch, quantizers
from llvq.models import factory
from llvq.training import optimizer
from llvq.training.objective import Objective, default_weights
from tests import reference, tiny
from tests.counting import count

pytestmark = reference.needs_reference

PAPERS_OBJECTIVE = Objective(default_weights())
HIDDEN_DIMS = {"fashion_mnist": (64,), "ffhq1024": (16, 32)}
CASES = pytest.mark.parametrize(("dataset", "quantizer"), list(reference.FILES))
TOLERANCE = 1e-4  # what float32 leaves of agreement after a backward pass; the rest is nearer 1e-6


def assert_close(actual, desired, what: str) -> None:
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape, what
    error = np.linalg.norm(actual - desired) / np.linalg.norm(desired)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def assert_trees_close(actual, desired, what: str) -> None:
    desired_by_path = dict(jax.tree.leaves_with_path(desired))
    actual_by_path = dict(jax.tree.leaves_with_path(actual))
    assert actual_by_path.keys() == desired_by_path.keys(), what
    for path, value in desired_by_path.items():
        assert_close(actual_by_path[path], value, f"{what} {jax.tree_util.keystr(path)}")


@functools.cache
def load(dataset: str, quantizer: str):
    """(golden numbers, graphdef, params, statistics) of the authors' model."""
    golden = reference.golden(dataset, quantizer)
    model = tiny.paper_model(
        quantizers.create(quantizer, 64, rngs=nnx.Rngs(0)),
        channels=golden["images"].shape[-1],
        hidden_dims=HIDDEN_DIMS[dataset],
        latent_activation="leaky_relu",
        output_activation="leaky_relu",
    )
    graphdef, ours_params, ours_statistics = factory.split(model)
    params, statistics = import_torch.parameters_from_state_dict(
        reference.state_dict(dataset, quantizer)
    )
    for ours, theirs in ((ours_params, params), (ours_statistics, statistics)):
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    return golden, graphdef, params, statistics


@functools.cache
def forward_backward(dataset: str, quantizer: str):
    """A training forward and backward, jitted as in training."""
    golden, graphdef, params, statistics = load(dataset, quantizer)

    @jax.jit
    def run(params, statistics, images):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, statistics)
            loss, metrics, pair = PAPERS_OBJECTIVE(model, images, train=True)
            _, _, after = factory.split(model)
            losses = metrics["reconstruction_loss"], metrics["quantizer_loss"]
            return loss, (pair.reconstructions, pair.codes, *losses, after)

        return jax.grad(loss_fn, has_aux=True)(params)

    return run(params, statistics, golden["images"])


def subset(golden: dict[str, np.ndarray], prefix: str):
    tensors = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    return import_torch.parameters_from_state_dict(tensors)


@CASES
def test_encoder(dataset, quantizer):
    golden, graphdef, params, statistics = load(dataset, quantizer)
    latents = nnx.merge(graphdef, params, statistics).encoder(golden["images"])
    assert_close(latents, golden["latents"], "latents")


@CASES
def test_quantizer_from_stored_latents(dataset, quantizer):
    golden, graphdef, params, statistics = load(dataset, quantizer)

    @jax.jit
    def run(latents):
        return nnx.merge(graphdef, params, statistics).quantizer(latents)

    quantized, codes, loss, _ = run(golden["latents"])
    np.testing.assert_array_equal(codes, golden.get("codes", golden.get("indices")))
    assert_close(quantized, golden["quantized"], "quantized")
    assert_close(loss, golden["eval/quantizer_loss"], "quantizer loss")
    if "perplexity" in golden:
        usage = count(np.asarray(codes).reshape(-1, 1), codes.size)
        assert_close(usage.perplexity, golden["perplexity"], "perplexity")


@CASES
def test_decoder(dataset, quantizer):
    golden, graphdef, params, statistics = load(dataset, quantizer)
    reconstruction = nnx.merge(graphdef, params, statistics).decoder(golden["quantized"])
    assert_close(reconstruction, golden["reconstruction"], "reconstruction")


@CASES
def test_training_forward(dataset, quantizer):
    golden, *_ = load(dataset, quantizer)
    _, (reconstruction, codes, reconstruction_loss, quantizer_loss, _) = forward_backward(
        dataset, quantizer
    )
    codes_golden = golden.get("codes", golden.get("indices"))
    if quantizer == "dense_lattice":
        # Codes reach 1e7: float32 latents that agree to 1e-7 still round apart at times, by one.
        assert np.abs(np.asarray(codes, np.int64) - codes_golden).max() <= 1
    else:
        np.testing.assert_array_equal(codes, codes_golden)
    assert_close(reconstruction, golden["reconstruction"], "reconstruction")
    assert_close(reconstruction_loss, golden["train/reconstruction_loss"], "reconstruction loss")
    assert_close(quantizer_loss, golden["train/quantizer_loss"], "quantizer loss")


@CASES
def test_every_gradient(dataset, quantizer):
    golden, *_ = load(dataset, quantizer)
    grads, _ = forward_backward(dataset, quantizer)
    assert_trees_close(grads, subset(golden, "grad/")[0], "gradient of")


@pytest.mark.parametrize(
    ("dataset", "quantizer"),
    [("fashion_mnist", "sparse_lattice"), ("ffhq1024", "vq"), ("ffhq1024", "sparse_lattice")],
)
def test_adam_step(dataset, quantizer):
    golden, _, params, _ = load(dataset, quantizer)
    grads, _ = forward_backward(dataset, quantizer)
    adam = optimizer.create("adam", {}, optax.constant_schedule(1e-3))
    updates, _ = adam.update(grads, adam.init(params))
    after = optax.apply_updates(params, updates)
    assert_trees_close(after, subset(golden, "after_adam_step/")[0], "after Adam")


def test_ema_update():
    golden, *_ = load("fashion_mnist", "vq_ema")
    *_, after = forward_backward("fashion_mnist", "vq_ema")[1]
    assert_trees_close(after, subset(golden, "after_ema_update/")[1], "after EMA")
