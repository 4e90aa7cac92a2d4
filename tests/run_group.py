"""One process of a group that trains and evaluates the tiny data set; see test_multi_process.py.

python -m tests.run_group ADDRESS NUM_PROCESSES PROCESS_ID DIRECTORY OTHER_DIRECTORY REFERENCE STEPS
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from llvq import train
from llvq.evaluate import evaluate
from llvq.runtime import distributed
from tests import tiny
from tests.runs import Recorder, leaves, run_steps

NUM_STEPS = 6
HALFWAY = 3
CHECKED_FURTHER = ("vq_ema", "dense_lattice")  # in float32, and by an evaluation
SMALL = {"model.num_residual_blocks": 0}


class RecordingDataset:
    """The tiny data set, and which of its training images were read."""

    def __init__(self):
        self._data = tiny.dataset()
        self.image_shape, self.num_images = self._data.image_shape, self._data.num_images
        self.fingerprint = ""
        self.read = []

    def batches(self, split, index_batches):
        for batch, images in self._data.batches(split, index_batches):
            if split == "train":
                self.read.append(batch.index.tolist())
            yield batch, images


@contextlib.contextmanager
def double_precision():
    """As JAX_ENABLE_X64=1 from the start, which the config asks for."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def config(quantizer, num_train_steps=NUM_STEPS):
    return tiny.config(
        quantizer,
        compute_dtype="float64",
        num_train_steps=num_train_steps,
        log_every_steps=1,
        eval_every_steps=NUM_STEPS,
        checkpoint_every_steps=HALFWAY,
        **SMALL,
    )


def run(quantizer, workdir, num_train_steps):
    """(leaves of the final state, loss of each step, indices read); in float64."""
    data, writer = RecordingDataset(), Recorder()
    with double_precision():
        state = train.train_and_evaluate(
            config(quantizer, num_train_steps), workdir, data, make_writer=lambda: writer
        )
    losses = list(writer.scalars["train/loss"].values())
    return leaves((state.params, state.statistics)), losses, data.read


def steps(quantizer, compute_dtype, num_devices):
    """Leaves of the state after a few steps."""
    context = double_precision() if compute_dtype == "float64" else contextlib.nullcontext()
    with context:
        return run_steps(quantizer, num_devices, NUM_STEPS - 1, compute_dtype, **SMALL)[-1]


def evaluation(quantizer, workdir, reference):
    """evaluation.json's figures of a checkpoint; in float64."""
    with double_precision():
        return evaluate(workdir, tiny.dataset(), checkpoint=reference)


def main():
    address, count, process_id, *directories, quantizers = sys.argv[1:]
    directory, other, reference = map(Path, directories)
    directory.mkdir(exist_ok=True)
    distributed.initialize(address, int(count), int(process_id))
    results, arrays = {"evaluation": {}}, {}

    def keep(name, state):
        arrays.update({f"{name}{key}": value for key, value in state.items()})

    for quantizer in filter(None, quantizers.split(",")):
        keep(f"{quantizer}/float64", steps(quantizer, "float64", int(count)))
        if quantizer in CHECKED_FURTHER:
            keep(f"{quantizer}/float32", steps(quantizer, "float32", int(count)))
            results["evaluation"][quantizer] = evaluation(
                quantizer, directory / quantizer, reference / quantizer
            )
    state, results["losses"], results["read"] = run("vq_ema", directory / "run", HALFWAY)
    keep("halfway", state)
    (directory / f"halfway-{process_id}").touch()
    while len(list(other.glob("halfway-*"))) < 6 - int(count):
        time.sleep(0.1)
    state, results["resumed_losses"], results["resumed_read"] = run(
        "vq_ema", other / "run", NUM_STEPS
    )
    keep("whole", state)
    np.savez(directory / f"{process_id}.npz", **arrays)
    (directory / f"{process_id}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
