"""Runs on the tiny data set, and what they leave behind."""

import jax
import numpy as np
import optax
from flax import nnx

from llvq.checkpointing import from_saved
from llvq.config import parse, to_dict
from llvq.data import order
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training import train_state
from llvq.training.objective import Objective
from llvq.training.train_step import make_train_step
from tests import tiny

CONSTANT = optax.constant_schedule(1e-3)


def leaves(state):
    """{path: array} of a pytree."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def assert_identical(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def newest(checkpoints):
    """The highest step of a directory of checkpoints, or 0."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


class Recorder:
    """A metric writer that remembers."""

    def __init__(self):
        self.scalars, self.images, self.histograms, self.texts = {}, {}, {}, {}
        self.hparams = {}

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self.scalars.setdefault(name, {})[step] = value

    def write_images(self, step, images):
        self.images[step] = images

    def write_histograms(self, step, arrays):
        self.histograms[step] = arrays

    def write_texts(self, step, texts):
        self.texts.setdefault(step, {}).update(texts)

    def write_hparams(self, hparams):
        self.hparams = hparams

    def close(self):
        pass


def objective(config):
    """What a run with this config minimises."""
    config = parse(config)
    return Objective(config.loss, config.loss_options)


def create_model(config):
    """The model that a run with this config starts with."""
    config = parse(config)
    return factory.create_model(config.architecture, config.seed)


def create_state(config, optimizer=None):
    """The state that a run with this config starts with."""
    return train_state.create_train_state(create_model(config), optimizer or optax.adam(CONSTANT))


def abstract_state(saved):
    """The train state of a run, by the config that its checkpoint holds, without arrays."""
    return jax.eval_shape(lambda: create_state(to_dict(from_saved(saved))))


def fitted_graphdef(config, mesh):
    """The structure of a config's model, on a mesh."""
    config = parse(config)
    model = factory.abstract_model(config.architecture)
    factory.fit_to_mesh(model, mesh, config.model.image_shape)
    return nnx.graphdef(model)


def make_step(config, mesh, schedule=CONSTANT):
    """A step of a run with this config, with Adam."""
    graphdef = fitted_graphdef(config, mesh)
    step, _ = make_train_step(graphdef, objective(config), optax.adam(schedule), schedule, mesh)
    return step


def run_steps(quantizer, num_devices, num_steps, compute_dtype, seed=3, **overrides):
    """The state after each step, the one that training takes, on a mesh of some devices."""
    config = tiny.config(quantizer, compute_dtype=compute_dtype, seed=seed, **overrides)
    data = tiny.dataset()
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    step = make_step(config, mesh)
    state = sharding.replicate(create_state(config), mesh)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = data.batches("train", order.training_batches(70, 16, seed=3, **share))
    states = []
    for _, (_, images) in zip(range(num_steps), batches, strict=False):
        state, _ = step(state, sharding.to_devices(images, mesh))
        states.append(leaves((state.params, state.statistics)))
    return states
