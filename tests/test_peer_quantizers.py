"""Compares with vector-quantize-pytorch 1.32: both agree, or it follows its own formula.

docs/quantizers.md lists the differences; these tests check most of them.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import BSQ, FSQ, LFQ, VQ, VQEMA, ResidualVQ, SimVQ
from tests.test_quantizers import grads_of
from tests.test_scalar_quantizers import assert_close, entropy, make_latents, soft_assignments

torch = pytest.importorskip("torch")
peers = pytest.importorskip("vector_quantize_pytorch")

pytestmark = pytest.mark.slow

DIM, SIZE = 8, 16


def of_peer(module, latents, weights=None):
    """(quantized, codes, loss, gradient by the latents of Σ weights·quantized + loss)."""
    given = torch.tensor(latents.reshape(1, -1, latents.shape[-1]), requires_grad=True)
    quantized, codes, *losses = module(given)
    loss = losses[0].sum() if losses else torch.zeros(())
    if weights is not None:
        (torch.sum(quantized * torch.tensor(weights.reshape(given.shape))) + loss).backward()
    arrays = quantized.detach().numpy(), codes.numpy(), loss.detach().numpy()
    return (*arrays, None if weights is None else given.grad.numpy().reshape(latents.shape))


@pytest.fixture
def codebook():
    return np.random.default_rng(5).normal(size=(SIZE, DIM)).astype(np.float32)


def set_codebook(module, codebook):
    module._codebook.embed.data.copy_(torch.tensor(codebook[None]))
    return module


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5), (3, 4)])
def test_fsq_bounds_differently(levels):
    latents = make_latents(len(levels), 2.0, shape=(100, 100))
    theirs = of_peer(peers.FSQ(list(levels)), latents)[0].reshape(latents.shape)
    counts, half_widths = np.array(levels), np.array(levels) // 2
    half_range = (counts - 1) * (1 + 1e-3) / 2
    offset = np.where(counts % 2 == 0, 0.5, 0.0)
    bounded = np.tanh(latents + np.arctanh(offset / half_range)) * half_range - offset
    is_clear = np.abs(bounded - np.floor(bounded) - 0.5) > 1e-4
    desired = np.round(bounded) / half_widths
    np.testing.assert_allclose(np.where(is_clear, theirs, 0), np.where(is_clear, desired, 0))
    ours = np.asarray(FSQ(levels)(latents)[0])
    assert 0.99 < np.mean(np.isclose(ours, theirs)) < 1.0


def test_lfq_clamps_logarithms_and_has_no_commitment_loss():
    latents = make_latents(6, 0.1)
    module = peers.LFQ(codebook_size=64).train()
    _, codes, loss, _ = of_peer(module, latents)
    flat = latents.reshape(-1, 6).astype(float)
    p = soft_assignments(flat, 1.0, 0.01)

    def clamped(p):
        return -(p * np.log(np.maximum(p, 1e-5))).sum(-1)

    assert_close(loss, 0.1 * (clamped(p).mean() - clamped(p.mean(0))), 1e-5)
    # Where all of 2¹⁷ codes are equally likely, each probability is below their limit.
    module = peers.LFQ(codebook_size=2**17).train()
    _, parts = module(torch.zeros(1, 1, 17), return_loss_breakdown=True)
    assert float(parts.batch_entropy) == pytest.approx(5 * np.log(10), rel=1e-5)
    quantizer = LFQ(codebook_size=2**17)
    metrics = quantizer(np.zeros((1, 17), np.float32)).metrics
    assert float(metrics["batch_entropy"]) == pytest.approx(17 * np.log(2), rel=1e-6)
    quantizer = LFQ(codebook_size=64)
    our_codes = quantizer(latents)[1]
    # The first bit is their most significant one and our least.
    reversed_codes = quantizer.codes_to_indices(our_codes[..., ::-1])
    np.testing.assert_array_equal(np.ravel(reversed_codes), codes.ravel())


def test_bsq_is_colder_goes_over_all_codes_and_rounds_zero_down():
    latents = make_latents(6)
    latents[0, 0] = 0.0
    latents[0, 0, :, 0] = 1.0
    quantized, _, loss, _ = of_peer(peers.LFQ(codebook_size=64, spherical=True).train(), latents)
    ours, _, _, metrics = BSQ(num_bits=6, temperature=0.01)(latents)
    np.testing.assert_allclose(quantized.reshape(latents.shape)[0, 1:], ours[0, 1:], rtol=1e-6)
    assert np.all(np.asarray(ours)[0, 0] > 0)
    assert np.all(quantized.reshape(latents.shape)[0, 0, :, 1:] < 0)
    flat = latents.reshape(-1, 6).astype(float)
    p = soft_assignments(flat / np.linalg.norm(flat, axis=-1, keepdims=True), 6**-0.5, 0.01)
    # Its logarithms are clamped at 1e-5: good to three digits.
    assert_close(loss, 0.1 * (entropy(p).mean() - entropy(p.mean(0))), 1e-3)
    assert float(metrics["batch_entropy"]) > entropy(p.mean(0))  # the bits' sum is an upper bound


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_vq_agrees_once_the_defaults_do(codebook, rotation_trick):
    latents, weights = make_latents(DIM), make_latents(DIM, seed=7)
    module = peers.VectorQuantize(
        DIM, SIZE, commitment_weight=0.25, ema_update=False, rotation_trick=rotation_trick
    )
    set_codebook(module, codebook).train()
    quantized, codes, loss, gradient = of_peer(module, latents, weights)
    quantizer = VQEMA(  # no codebook loss, as theirs
        DIM,
        codebook_size=SIZE,
        gradient="rotation" if rotation_trick else "straight_through",
        rngs=nnx.Rngs(0),
    )
    quantizer.codebook[...] = jnp.asarray(codebook)
    ours, our_codes, our_loss, _ = quantizer(latents)
    np.testing.assert_array_equal(np.ravel(our_codes), codes.ravel())
    np.testing.assert_allclose(np.ravel(ours), quantized.ravel(), rtol=1e-5, atol=1e-6)
    assert float(our_loss) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(
        grads_of(quantizer, latents, weights)[1], gradient, rtol=1e-4, atol=1e-5
    )
    defaults = peers.VectorQuantize(DIM, SIZE)
    assert (defaults.commitment_weight, defaults._codebook.decay) == (1.0, 0.8)
    assert defaults.rotation_trick
    assert torch.all(defaults._codebook.cluster_size == 1)


def test_vq_learns_from_its_codebook_loss_too_and_theirs_by_averages(codebook):
    latents = make_latents(DIM)
    module = set_codebook(peers.VectorQuantize(DIM, SIZE, commitment_weight=0.25), codebook)
    quantizer = VQ(DIM, codebook_size=SIZE, rngs=nnx.Rngs(0))
    quantizer.codebook[...] = jnp.asarray(codebook)
    ours, theirs = quantizer(latents).loss, of_peer(module, latents)[2]
    assert float(ours) == pytest.approx(5 * float(theirs), rel=1e-5)


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_simvq_rotates_by_default(rotation_trick):
    latents, weights = make_latents(DIM), make_latents(DIM, seed=7)
    module = peers.SimVQ(DIM, SIZE, rotation_trick=rotation_trick).train()
    quantizer = SimVQ(DIM, codebook_size=SIZE, rngs=nnx.Rngs(0))
    quantizer.coefficients[...] = jnp.asarray(module.frozen_codebook.numpy())
    quantizer.basis[...] = jnp.asarray(module.code_transform.weight.detach().numpy().T)
    quantized, codes, loss, gradient = of_peer(module, latents, weights)
    ours, our_codes, our_loss, _ = quantizer(latents)
    np.testing.assert_array_equal(np.ravel(our_codes), codes.ravel())
    np.testing.assert_allclose(np.ravel(ours), quantized.ravel(), rtol=1e-5, atol=1e-6)
    assert float(our_loss) == pytest.approx(float(loss), rel=1e-5)
    is_same = np.allclose(grads_of(quantizer, latents, weights)[1], gradient, atol=1e-5)
    assert is_same == (not rotation_trick)
    assert peers.SimVQ(DIM, SIZE).rotation_trick


def test_residual_vq_multiplies_the_gradient_by_the_depth():
    depth = 3
    latents, weights = make_latents(DIM), make_latents(DIM, seed=7)
    module = peers.ResidualVQ(
        dim=DIM,
        num_quantizers=depth,
        codebook_size=SIZE,
        rotation_trick=False,
        commitment_weight=0.25,
        ema_update=False,
    ).train()
    quantizer = ResidualVQ(DIM, depth=depth, codebook_size=SIZE, dropout=False, rngs=nnx.Rngs(0))
    for ours, theirs in zip(quantizer.stages, module.layers, strict=True):
        ours.codebook[...] = jnp.asarray(theirs.codebook.numpy())
    quantized, codes, loss, gradient = of_peer(module, latents, weights)
    ours, our_codes, our_loss, _ = quantizer(latents)
    np.testing.assert_array_equal(np.reshape(our_codes, codes.shape), codes)
    np.testing.assert_allclose(np.ravel(ours), quantized.ravel(), rtol=1e-5, atol=1e-5)
    assert float(our_loss) == pytest.approx(float(loss), rel=1e-5)
    commitment = jax.grad(lambda z: quantizer(z).loss)(latents)
    np.testing.assert_allclose(gradient, depth * weights + commitment, rtol=1e-4, atol=1e-5)
    by_latents = grads_of(quantizer, latents, weights)[1]
    np.testing.assert_allclose(by_latents, weights + commitment, rtol=1e-4, atol=1e-5)
