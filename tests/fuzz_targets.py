"""What is fuzzed: each function tries one case and says ("done", result) or ("refused", line).

They run in a child of the tests (see tests/processes.py); what they raise is a failure.
"""

import contextlib
import functools
import hashlib
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath

import main
from llvq import checkpointing, train
from llvq.checkpointing import check_resumable, from_saved
from llvq.config import parse as parse_config
from llvq.config import to_dict
from llvq.errors import UserError
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training.schedules import SCHEDULES
from tests import image_data, tiny
from tests.runs import create_state, make_step

NOWHERE = "http://127.0.0.1:9/"  # nothing listens there: no case waits for the web


def target(function):
    """Turns the errors that a user may see into an outcome, as main.py does."""

    @functools.wraps(function)
    def run(*arguments):
        try:
            return "done", function(*arguments)
        except UserError as error:
            return "refused", str(error)
        except SystemExit as error:
            return "refused", str(error.code)

    return run


def _reset_flags():
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@target
def parse(arguments):
    """main.py's flags; the config, as JSON, of what it would run."""
    _reset_flags()
    sys.argv = ["main.py", *arguments]
    with contextlib.redirect_stderr(io.StringIO()):
        main._parse_flags(sys.argv)
    if flags.FLAGS.config is None:  # a checkpoint's own is taken
        return {}
    config = parse_config(flags.FLAGS.config)
    saved = json.loads(json.dumps(to_dict(config)))
    check_resumable(config, from_saved(saved), "the run's own directory")
    train.num_train_steps(config, 55_000)
    return saved


@target
def trace(config):
    """A step of training, down to what XLA is given, for images of the config's shape."""
    with jax.enable_x64(config["compute_dtype"] == "float64"):
        parsed = parse_config(config)
        model = factory.abstract_model(parsed.architecture)
        height, _ = factory.latent_shape(model, parsed.model.image_shape)
        mesh = sharding.mesh_for_batches(parsed.batch_size, height)
        schedule = SCHEDULES[parsed.schedule](parsed.learning_rate, 10, 100)
        state = jax.eval_shape(lambda: create_state(parsed))
        images = jax.ShapeDtypeStruct((parsed.batch_size, *parsed.model.image_shape), np.uint8)
        step = make_step(parsed, mesh, schedule)
        new_state, metrics = jax.eval_shape(step, state, images)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert metrics["loss"].shape == ()


@target
def train_tiny(config, workdir):
    """A run on the tiny data set; the number of steps that it took."""
    with jax.enable_x64(config["compute_dtype"] == "float64"):
        state = train.train_and_evaluate(config, workdir, tiny.dataset())
        return int(state.step)


def _digests(load, directory):
    """{split: (number, digest) of its images} of a data set; all of them are read."""
    manual = Path(directory, "manual")
    data = load(f"{directory}/data", str(manual) if manual.is_dir() else "")
    digests = {}
    for split, count in data.num_images.items():
        images = image_data.read_images(data, split, 2) if count else np.zeros(0, np.uint8)
        assert len(images) == count
        assert images.dtype == np.uint8
        digests[split] = count, hashlib.sha256(images.tobytes()).hexdigest()
    return digests


@target
def load_fashion_mnist(directory, files):
    """IDX files of a directory, or what TFDS prepared there; `files` tells what is official."""
    import tensorflow_datasets as tfds

    from input_pipeline import fashion_mnist

    fashion_mnist._FILES = files
    fashion_mnist._DEBIAN_DIR = epath.Path("/nowhere")
    tfds.image_classification.FashionMNIST.URL = NOWHERE
    num_images = {split: (num_bytes - 16) // 28**2 for split, (_, num_bytes, _) in files.items()}
    return _digests(functools.partial(fashion_mnist.load, num_images=num_images), directory)


@target
def load_celeba(directory):
    """The layouts in DIRECTORY/manual, or what is prepared in DIRECTORY/data."""
    from input_pipeline import celeba

    celeba._PROBE_URL = NOWHERE
    return _digests(image_data.load_celeba, directory)


@target
def load_ffhq(directory):
    """The release in DIRECTORY/manual, what is prepared in DIRECTORY/data, or DIRECTORY/hub."""
    from input_pipeline import ffhq1024

    hub = image_data.Hub(ffhq1024._HUB_DATASET, ffhq1024._HUB_REVISION)
    hub.files = {p.name: p.read_bytes() for p in Path(directory, "hub").glob("*") if p.is_file()}
    with image_data.serve(hub.answer) as url, pytest.MonkeyPatch.context() as patch:
        image_data.point_at(url, patch)
        return _digests(image_data.load_ffhq, directory)


@target
def import_torch(directory):
    """A PyTorch checkpoint, imported; what is written can be loaded."""
    from llvq import import_torch

    with contextlib.redirect_stdout(io.StringIO()):
        import_torch.main([f"--checkpoint={directory}/model.ckpt", f"--output={directory}/output"])
    checkpointing.model_of(checkpointing.load(f"{directory}/output"))
