"""The network: sizes, initialisation, and every layer against PyTorch and NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from llvq import import_torch, quantizers
from llvq.errors import UserError
from llvq.models import factory, layers
from tests import tiny

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def make(quantizer="sparse_lattice", channels=1, hidden_dims=(64,), seed=0):
    rngs = nnx.Rngs(seed)
    quantizer = quantizers.create(quantizer, 0, rngs=rngs)
    return tiny.paper_model(quantizer, channels=channels, hidden_dims=hidden_dims, rngs=rngs)


@pytest.mark.parametrize(
    ("quantizer", "channels", "hidden_dims", "count"),
    [
        ("sparse_lattice", 1, (64,), 244_033),
        ("dense_lattice", 1, (64,), 244_033),
        ("vq", 1, (64,), 276_737),
        ("vq_ema", 1, (64,), 310_017),
        ("sparse_lattice", 3, (64,), 248_131),
        ("sparse_lattice", 3, (16, 32), 88_835),
    ],
)
def test_number_of_parameters(quantizer, channels, hidden_dims, count):
    _, params, statistics = factory.split(make(quantizer, channels, hidden_dims))
    assert factory.num_parameters((params, statistics)) == count


def conv_in_float64(x, kernel, strides, padding):
    """A convolution as its definition says, one output pixel at a time."""
    x = np.pad(x.astype(np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    size = kernel.shape[0]
    height, width = ((n - size) // strides + 1 for n in x.shape[1:3])
    out = np.empty((len(x), height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * strides : i * strides + size, j * strides : j * strides + size]
            out[:, i, j] = np.einsum("nhwc,hwco->no", window, kernel.astype(np.float64))
    return out


def conv_transpose_in_float64(x, kernel):
    """Each input pixel spreads a mirrored kernel over the output (stride 2, one pixel cropped)."""
    n, h, w, _ = x.shape
    out = np.zeros((n, 2 * h + 2, 2 * w + 2, kernel.shape[3]))
    mirrored = kernel[::-1, ::-1].astype(np.float64)
    for i in range(h):
        for j in range(w):
            spread = np.einsum("nc,hwco->nhwo", x[:, i, j].astype(np.float64), mirrored)
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += spread
    return out[:, 1:-1, 1:-1]


@pytest.mark.parametrize(("size", "strides"), [(4, 2), (3, 1), (1, 1)])
def test_conv_against_its_definition(size, strides):
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)
    layer = layers.Conv(3, 5, size, strides=strides, rngs=nnx.Rngs(0), **KINDS)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    padding = {4: 1, 3: 1, 1: 0}[size]
    desired = conv_in_float64(x, kernel, strides, padding) + bias
    assert desired.shape == (2, 8 // strides, 6 // strides, 5)
    np.testing.assert_allclose(layer(x), desired, atol=1e-5)


def test_conv_transpose_against_its_definition():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32)
    layer = layers.ConvTranspose(3, 5, rngs=nnx.Rngs(0), **KINDS)
    desired = conv_transpose_in_float64(x, np.asarray(layer.kernel[...])) + layer.bias[...]
    assert desired.shape == (2, 8, 6, 5)
    np.testing.assert_allclose(layer(x), desired, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_conv_against_pytorch(transposed):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    torch.manual_seed(0)
    if transposed:
        theirs = torch.nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1)
        ours = layers.ConvTranspose(3, 5, rngs=nnx.Rngs(0), **KINDS)
        to_kernel = import_torch.conv_transpose_kernel
    else:
        theirs = torch.nn.Conv2d(3, 5, 4, stride=2, padding=1)
        ours = layers.Conv(3, 5, 4, strides=2, rngs=nnx.Rngs(0), **KINDS)
        to_kernel = import_torch.conv_kernel
    ours.kernel[...] = jnp.asarray(to_kernel(theirs.weight.detach().numpy()))
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    desired = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(ours(x), desired.transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda rngs: layers.Conv(16, 32, 4, strides=2, rngs=rngs, **KINDS), 16 * 16),
        (lambda rngs: layers.Conv(32, 64, 3, rngs=rngs, **KINDS), 32 * 9),
        # PyTorch counts a transposed convolution's fan_in by its output channels.
        (lambda rngs: layers.ConvTranspose(64, 16, rngs=rngs, **KINDS), 16 * 16),
    ],
)
def test_initial_values_are_pytorchs(layer, fan_in):
    bound = 1 / np.sqrt(fan_in)
    made = [layer(nnx.Rngs(seed)) for seed in range(20)]
    for arrays in ([m.kernel[...] for m in made], [m.bias[...] for m in made]):
        values = np.ravel(arrays)
        assert 0.97 * bound < np.abs(values).max() <= bound
        assert abs(values.std() - bound / np.sqrt(3)) < 0.06 * bound


def test_residual_block():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = layers.ResidualBlock(4, rngs=nnx.Rngs(0), **KINDS)
    assert block.conv3x3.bias is None
    assert block.conv1x1.bias is None
    inner = np.maximum(conv_in_float64(x, np.asarray(block.conv3x3.kernel[...]), 1, 1), 0)
    desired = x + conv_in_float64(inner, np.asarray(block.conv1x1.kernel[...]), 1, 0)
    np.testing.assert_allclose(block(x), desired, atol=1e-5)


@pytest.mark.parametrize(("size", "hidden_dims"), [(28, (64,)), (148, (64,)), (64, (16, 32))])
def test_shapes(size, hidden_dims):
    model = make("vq", 3, hidden_dims)
    images = np.zeros((1, size, size, 3), np.float32)
    codes = model.encode(images)
    assert codes.shape == (1, size // 2 ** len(hidden_dims), size // 2 ** len(hidden_dims))
    assert model.decode(codes).shape == images.shape


@pytest.mark.parametrize("quantizer", quantizers.QUANTIZERS)
def test_codes_hold_all_that_the_decoder_gets(quantizer):
    model = make(quantizer)
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 28, 28, 1)).astype(np.float32)
    np.testing.assert_array_equal(model.decode(model.encode(images)), model.reconstruct(images))


def test_seeds_draw_different_parameters_and_layers_too():
    kernels = [make(seed=seed).encoder.mix.kernel[...] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.any(kernels[0] != kernels[2])
    blocks = make().encoder.residual_blocks
    assert np.any(blocks[0].conv3x3.kernel[...] != blocks[1].conv3x3.kernel[...])


def test_bfloat16_computes_in_bfloat16_and_quantizes_in_float32():
    rngs = nnx.Rngs(0)
    quantizer = quantizers.create("dense_lattice", 64, rngs=rngs)
    model = tiny.paper_model(quantizer, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    images = np.zeros((1, 28, 28, 1), np.float32)
    latents = model.encoder(images)
    assert latents.dtype == jnp.bfloat16
    quantized, codes, loss, _ = model.quantizer(latents)
    assert (quantized.dtype, codes.dtype) == (jnp.bfloat16, jnp.int32)
    exact, codes_of_float32, loss_of_float32, _ = model.quantizer(latents.astype(jnp.float32))
    np.testing.assert_array_equal(codes, codes_of_float32)
    np.testing.assert_array_equal(quantized, exact.astype(jnp.bfloat16))
    assert loss == loss_of_float32
    assert loss.dtype == jnp.float32
    assert model.decoder(quantized).dtype == jnp.bfloat16


def test_foreign_tensor_names_are_refused():
    with pytest.raises(UserError, match=r"'layer1.0.conv1.weight' is not of an LL-VQ-VAE"):
        import_torch.parameters_from_state_dict({"layer1.0.conv1.weight": np.zeros((1, 1, 3, 3))})


@pytest.mark.parametrize("value_range", [(-0.5, 0.5), (0.0, 1.0)])
def test_uint8_images_are_scaled_by_the_models_value_range(value_range):
    low, high = value_range
    quantizer = quantizers.create("dense_lattice", 64, rngs=nnx.Rngs(0))
    model = tiny.paper_model(quantizer, value_range=value_range)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    floats = np.float32(low) + images / np.float32(255) * np.float32(high - low)
    codes = model.encode(floats)
    np.testing.assert_array_equal(model.encode(images), codes)
    np.testing.assert_array_equal(model.reconstruct(images), model.reconstruct(floats))
    decoded = np.asarray(model.decode(codes), np.float64)
    expected = np.rint(255 * np.clip((decoded - low) / (high - low), 0, 1))
    found = model.decode_uint8(codes)
    assert found.dtype == np.uint8
    # Float32 against float64: a value that lies at a half may round either way.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.mean(found != expected) < 0.01
    np.testing.assert_array_equal(model.to_uint8(model.to_floats(images)), images)


def test_images_that_cannot_be_scaled_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"images must be uint8 or float, not int32"):
        model.encode(np.zeros((1, 28, 28, 1), np.int32))
    assert model.encode(np.zeros((1, 28, 28, 1), np.float32)).shape == (1, 14, 14, 64)


@pytest.mark.parametrize("size", [(29, 28), (28, 1)])
def test_a_size_that_cannot_be_halved_is_named(size):
    for function in (make(), make().encode, make().reconstruct):
        with pytest.raises(ValueError, match=r"must be multiples of 2, not \[\d+, \d+\]"):
            function(np.zeros((1, *size, 1), np.float32))
