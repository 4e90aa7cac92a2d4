"""What is fuzzed: each function tries one case and says ("done", result) or ("refused", line).

They run in a child of the tests (see tests/fuzzing.py); what they raise is a failure.
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
from absl import flags
from etils import epath

import main
from llvq import checkpointing, evaluate, train
from llvq.config import (
    check_resumable,
    check_same_model,
    derive,
    num_train_steps,
    to_dict,
    to_markdown,
    to_saved,
)
from llvq.config import parse as parse_config
from llvq.data import ArrayDataset
from llvq.errors import UserError
from llvq.runtime import sharding
from llvq.training import schedules, train_state
from llvq.training.train_step import make_train_step
from tests import image_data, tiny
from tests.runs import create_model, fitted_graphdef

NOWHERE = "http://127.0.0.1:9/"  # nothing listens there: no case waits for the web
CELEBA = {"train": 4, "validation": 2, "test": 2}
FFHQ = {"train": 4, "validation": 2}
FFHQ_PER_GROUP = 2


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
    config = parse_config(flags.FLAGS.config)
    derived = derive(config, 8)
    saved = json.loads(json.dumps(to_saved(config, derived)))
    check_resumable(derived, saved, "the run's own directory")
    check_same_model(config, saved, "the run's own checkpoint")
    to_markdown(config)
    num_train_steps(derived, 55_000)
    return json.loads(json.dumps(to_dict(config)))


@target
def trace(config):
    """A step of training, down to what XLA is given, for images of the config's shape."""
    with jax.enable_x64(config["compute_dtype"] == "float64"):
        parsed = parse_config(config)
        mesh = sharding.mesh_for_batches(parsed.batch_size, parsed.latent_shape[0])
        schedule = schedules.create(parsed.schedule, parsed.learning_rate, 10, 100)
        state = jax.eval_shape(lambda: train_state.create_train_state(create_model(parsed)))
        images = jax.ShapeDtypeStruct((parsed.batch_size, *parsed.model.image_shape), np.uint8)
        step, _ = make_train_step(fitted_graphdef(parsed, mesh), schedule, mesh)
        new_state, metrics = jax.eval_shape(step, state, images)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert metrics["loss"].shape == ()


@target
def train_tiny(config, workdir):
    """A run on the tiny data set; the number of steps that it took."""
    with jax.enable_x64(config["compute_dtype"] == "float64"):
        state = train.train_and_evaluate(config, workdir, tiny.dataset())
        return int(state.step)


def _digests(data):
    """{split: (number, digest) of its images}, all of which are read."""
    digests = {}
    for split, count in data.num_images.items():
        images = image_data.read_images(data, split, 2) if count else np.zeros(0, np.uint8)
        assert len(images) == count
        assert images.dtype == np.uint8
        digests[split] = count, hashlib.sha256(images.tobytes()).hexdigest()
    return digests


def _manual(directory):
    manual = Path(directory, "manual")
    return str(manual) if manual.is_dir() else ""


@target
def load_fashion_mnist(directory, files):
    """IDX files of a directory, or what TFDS prepared there; `files` tells what is official."""
    import tensorflow_datasets as tfds

    from input_pipeline import fashion_mnist

    fashion_mnist._FILES = files
    fashion_mnist._DEBIAN_DIR = epath.Path("/nowhere")
    tfds.image_classification.FashionMNIST.URL = NOWHERE
    num_images = {split: (num_bytes - 16) // 28**2 for split, (_, num_bytes, _) in files.items()}
    return _digests(
        fashion_mnist.load(f"{directory}/data", _manual(directory), num_images=num_images)
    )


@target
def load_celeba(directory):
    """The layouts in DIRECTORY/manual, or what is prepared in DIRECTORY/data."""
    from input_pipeline import celeba

    celeba._PROBE_URL = NOWHERE
    return _digests(celeba.load(f"{directory}/data", _manual(directory), num_images=CELEBA))


@target
def load_ffhq(directory):
    """The release in DIRECTORY/manual, what is prepared in DIRECTORY/data, or DIRECTORY/hub."""
    import huggingface_hub.constants

    from input_pipeline import ffhq1024

    def load(manual=""):
        data = ffhq1024.load(
            f"{directory}/data",
            manual,
            num_images=FFHQ,
            images_per_group=FFHQ_PER_GROUP,
            image_shape=(image_data.PIXELS, image_data.PIXELS, 3),
        )
        return _digests(data)

    hub = image_data.Hub(ffhq1024._HUB_DATASET, ffhq1024._HUB_REVISION)
    if manual := _manual(directory):
        return load(manual)
    if Path(f"{directory}/hub").is_dir():
        hub.files = {
            p.name: p.read_bytes() for p in Path(directory, "hub").iterdir() if p.is_file()
        }
    else:
        hub.status = 404
    with image_data.serve(hub):
        huggingface_hub.constants.ENDPOINT = hub.url
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = template
        return load()


@target
def import_torch(directory):
    """A PyTorch checkpoint, imported; what is written can be loaded."""
    from llvq import import_torch

    with contextlib.redirect_stdout(io.StringIO()):
        import_torch.main([f"--checkpoint={directory}/model.ckpt", f"--output={directory}/output"])
    checkpointing.model_of(checkpointing.load(f"{directory}/output"))


@target
def load_checkpoint(directory, config):
    """A checkpoint of a run, as --checkpoint would take it; digests of its tensors."""
    checkpoint = checkpointing.load(f"{directory}/checkpoints/2")
    check_same_model(parse_config(config), checkpoint.config, directory)
    checkpointing.model_of(checkpoint)
    tensors = jax.tree.leaves(checkpoint.state)
    return [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in tensors]


@target
def evaluate_checkpoint(directory, config):
    """The same, evaluated."""
    small = ArrayDataset(train=tiny.images(8), validation=tiny.images(8, 1), test=tiny.images(8, 2))
    results = evaluate.evaluate(
        config, f"{directory}/evaluation", small, checkpoint=f"{directory}/checkpoints/2"
    )
    return results["reconstruction_loss"]
