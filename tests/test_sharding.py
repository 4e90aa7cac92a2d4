"""How devices share batches: by images where there are enough, else by rows of images as well."""

import jax
import numpy as np
import optax
import pytest

from benchmarks.tpu_compile import count_collectives
from llvq import evaluate, train
from llvq.data import ArrayDataset
from llvq.errors import UserError
from llvq.evaluation.steps import make_steps
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training.train_step import make_train_step
from tests import tiny
from tests.runs import CONSTANT, create_state, fitted_graphdef, objective


@pytest.mark.parametrize(
    ("batch_size", "latent_height", "shape"),
    [
        (16, 7, {"data": 8, "height": 1}),
        (8, 7, {"data": 8, "height": 1}),
        (4, 8, {"data": 4, "height": 2}),
        (2, 8, {"data": 2, "height": 4}),
        (1, 8, {"data": 1, "height": 8}),
        (12, 6, {"data": 4, "height": 2}),  # three images for each two devices
    ],
)
def test_images_are_split_where_they_do_not_suffice(batch_size, latent_height, shape):
    mesh = sharding.mesh_for_batches(batch_size, latent_height)
    assert dict(mesh.shape) == shape
    images = sharding.to_devices(np.zeros((batch_size, 4 * latent_height, 5, 3), np.uint8), mesh)
    share = (batch_size // shape["data"], 4 * latent_height // shape["height"], 5, 3)
    assert {shard.data.shape for shard in images.addressable_shards} == {share}


class FakeDevice:
    """A device as far as a mesh can tell."""

    platform, device_kind = "fake", "fake"

    def __init__(self, process_index):
        self.process_index = process_index


def hosts(num_hosts, num_devices):
    """Devices of several hosts, in turns."""
    return [FakeDevice(i % num_hosts) for i in range(num_devices)]


def test_no_two_hosts_share_an_image():
    for batch_size, num_hosts in ((4, 4), (4, 2), (2, 2), (1, 1)):
        mesh = sharding.mesh_for_batches(batch_size, 8, hosts(num_hosts, 8))
        for group in mesh.devices:
            assert len({device.process_index for device in group}) == 1


@pytest.mark.parametrize(
    ("batch_size", "latent_height", "num_hosts"),
    [(9, 6, 1), (2, 6, 1), (2, 8, 4), (12, 8, 8)],
)
def test_what_cannot_be_shared_is_refused(batch_size, latent_height, num_hosts):
    message = rf"batch_size={batch_size} does not divide by the 8 devices.* a multiple of 8"
    with pytest.raises(UserError, match=message):
        sharding.mesh_for_batches(batch_size, latent_height, hosts(num_hosts, 8))


def test_processes_with_unequal_devices_are_refused():
    devices = [FakeDevice(i) for i in (0, 0, 0, 1)]
    with pytest.raises(UserError, match=r"the 2 processes have 3, 1 devices: give each"):
        sharding.mesh_for_batches(4, 8, devices)


def train_and_evaluate(workdir):
    """Final state and evaluation of a short run whose batches are two images of 16×16."""
    images = np.random.default_rng(0).integers(0, 256, (15, 16, 16, 1), np.uint8)
    data = ArrayDataset(train=images[:7], validation=images[7:12], test=images[12:])
    config = tiny.config(
        "vq_ema",
        batch_size=2,
        compute_dtype="float64",
        **{"model.image_shape": (16, 16, 1), "num_train_steps": 4, "eval_every_steps": 4},
    )
    state = train.train_and_evaluate(config, workdir, data)
    return jax.device_get(state), evaluate.evaluate(workdir, data)


@pytest.mark.slow
def test_two_images_on_eight_devices_are_the_same_run_as_on_one(tmp_path, monkeypatch):
    """In float64, where rounding does not reach the figures: see tests/test_train.py.

    VQ-EMA, whose statistics are sums over all devices as well.
    """
    with jax.enable_x64(True):
        eight = train_and_evaluate(tmp_path / "eight")
        first, *_ = jax.devices()
        monkeypatch.setattr(jax, "devices", lambda: [first])
        one = train_and_evaluate(tmp_path / "one")
    for ours, theirs in zip(jax.tree.leaves(eight[0]), jax.tree.leaves(one[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.linalg.norm(theirs))
    for name, value in one[1].items():
        assert eight[1][name] == (
            pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        ), name


def crossing(step, *arguments):
    """Bytes that cross between devices in a step, by the kind of collective."""
    program = step.lower(*arguments).compile().as_text()
    return {kind: counted["bytes"] for kind, counted in count_collectives(program).items()}


@pytest.mark.parametrize(("name", "num_devices"), [("vq", 1), *((name, 8) for name in tiny.PAPER)])
def test_gradients_sums_and_nothing_else_cross_between_devices(name, num_devices):
    config = tiny.config(name)
    if name == "vq_ema":
        config["quantizer"]["codebook_size"] = 2_400  # several blocks
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    graphdef = fitted_graphdef(config, mesh)
    state = jax.eval_shape(lambda: create_state(config))
    images, mask, count = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((16, 12, 12, 1), np.uint8), ((16,), bool), ((mesh.size,), np.int32))
    )
    training = graphdef, objective(config), optax.adam(CONSTANT), CONSTANT, mesh
    train_step, _ = make_train_step(*training)
    metrics_step = make_steps(graphdef, objective(config), mesh).measure
    num_distances = 1 if name == "vq_ema" else 2  # among the quantizer's losses
    num_sums = factory.num_parameters(state.params) + 1 + num_distances
    if name == "vq_ema":  # learns from the sum and the number of each code's vectors
        num_sums += config["quantizer"]["codebook_size"] * (config["model"]["latent_dim"] + 1)
    in_training = {"all-reduce": 4 * num_sums}
    # Three metrics of the images and their number; the reconstruction loss and each distance, with
    # over how many they are.
    in_evaluation = {"all-reduce": 4 * (3 + 1 + 2 * (1 + num_distances))}
    cases = [
        (train_step, (images,), in_training),
        (metrics_step, (images, mask, count), in_evaluation),
    ]
    if name == "vq_ema":
        several, _ = make_train_step(*training, several=True)
        index = jax.ShapeDtypeStruct((3, 16), np.int32)
        cases.append((several, (images, index), in_training))  # written once, for every step
    for step, arguments, expected in cases:
        assert crossing(step, state, *arguments) == (expected if num_devices > 1 else {})
