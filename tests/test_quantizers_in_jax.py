"""The quantizers under JAX's transformations, against the plain call."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llvq import quantizers
from tests import tiny

DIM = 8
KEY = jax.random.key(0)
LATENTS = np.random.default_rng(0).normal(size=(8, 3, DIM)).astype(np.float32)


def make(name, **options):
    return quantizers.create(name, DIM, rngs=nnx.Rngs(1), **tiny.OPTIONS.get(name, {}) | options)


def assert_same(actual, desired):
    """Codes are equal; everything else agrees within float32 rounding.

    Rounding means 2e-6 of the largest entry: sums of some hundred terms in another order. Some
    losses are differences of others, so that the largest one sets the scale of all.
    """
    losses = [float(abs(x)) for x in jax.tree.leaves(desired) if not x.shape]
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if jnp.issubdtype(theirs.dtype, jnp.integer):
            np.testing.assert_array_equal(ours, theirs)
        else:
            scale = np.abs(theirs).max() if theirs.shape else max(losses)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * scale)


def make_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


FEW = ("residual_vq",)  # which has statistics and keys


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in tiny.DISTINCT]
)
class TestTransformations:
    def test_jit_and_bfloat16(self, name):
        quantizer = make(name)
        assert_same(jax.jit(lambda z: quantizer(z))(LATENTS), quantizer(LATENTS))
        narrow = LATENTS.astype(jnp.bfloat16)
        quantized, *others = quantizer(narrow)
        assert quantized.dtype == jnp.bfloat16
        wide = quantizer(narrow.astype(np.float32))
        assert_same(others, list(wide[1:]))
        np.testing.assert_array_equal(quantized, wide[0].astype(jnp.bfloat16))

    def test_vmap_and_scan(self, name):
        """Quantized latents and codes agree; the losses are means over the batch."""
        quantizer = make(name)
        desired = quantizer(LATENTS)[:2]
        assert_same(jax.vmap(lambda z: quantizer(z)[:2])(LATENTS), desired)
        _, scanned = jax.lax.scan(lambda _, z: (None, quantizer(z)[:2]), None, LATENTS)
        assert_same(scanned, desired)

    @pytest.mark.slow
    def test_training_in_a_scan_is_a_loop_of_calls(self, name):
        graphdef, params, statistics = nnx.split(make(name), nnx.Param, ...)

        def step(statistics, index):
            quantizer = nnx.merge(graphdef, params, statistics)
            key = jax.random.fold_in(KEY, index)
            output = quantizer(LATENTS + index, train=True, key=key)
            return nnx.state(quantizer, nnx.Not(nnx.Param)), output[1:]

        last, scanned = jax.lax.scan(step, statistics, jnp.arange(3))
        for index in range(3):
            statistics, found = jax.jit(step)(statistics, index)
            assert_same(jax.tree.map(lambda x, index=index: x[index], scanned), found)
        assert_same(last, statistics)

    def test_shard_map_and_sharded_batches(self, name):
        quantizer = make(name)
        mesh = make_mesh()
        spec = PartitionSpec("data")
        desired = quantizer(LATENTS)
        mapped = jax.shard_map(
            lambda z: quantizer(z)[:2], mesh=mesh, in_specs=spec, out_specs=(spec, spec)
        )
        assert_same(jax.jit(mapped)(LATENTS), desired[:2])
        split = jax.device_put(LATENTS, NamedSharding(mesh, spec))
        assert_same(jax.jit(lambda z: quantizer(z))(split), desired)

    @pytest.mark.slow
    def test_gradients_in_nnx(self, name):
        """With and without nnx.jit, gradients and the state after the call are the same."""

        def loss_fn(quantizer, latents):
            output = quantizer(latents, train=True, key=KEY)
            return jnp.sum(output.quantized**2) + output.loss

        grad = nnx.grad(loss_fn, argnums=(0, 1))
        plain, jitted = make(name), make(name)
        # In one vector, with one scale: a density's weights have differences for gradients.
        ours, theirs = nnx.jit(grad)(jitted, LATENTS), grad(plain, LATENTS)
        assert_same(ravel_pytree(ours)[0], ravel_pytree(theirs)[0])
        assert_same(nnx.state(jitted), nnx.state(plain))


RANDOM = [
    ("vq", {"restart_threshold": 0.5, "initialization": "batch", "codebook_size": 64}),
    ("vq_ema", {"restart_threshold": 0.5, "initialization": "batch", "codebook_size": 64}),
    ("residual_vq", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), RANDOM)
def test_what_is_random_depends_on_the_key_and_not_on_the_devices(name, options):
    graphdef, state = nnx.split(make(name, **options))

    @jax.jit
    def train(state, key, latents):
        quantizer = nnx.merge(graphdef, state)
        output = quantizer(latents, train=True, key=key)
        return *output[1:], nnx.state(quantizer)

    mesh = make_mesh()
    split = jax.device_put(LATENTS, NamedSharding(mesh, PartitionSpec("data")))
    one, eight = train(state, KEY, LATENTS), train(state, KEY, split)
    assert_same(eight, one)
    codes = train(state, jax.random.key(1), LATENTS)[0]
    assert np.any(np.asarray(codes) != np.asarray(one[0]))
