"""Encodes a tiny data set as one process of a group; see test_encode.py.

    python -m tests.run_encode DIRECTORY MODELS ADDRESS NUM_PROCESSES PROCESS_ID

The workdirs are DIRECTORY/MODEL.
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
from flax import nnx

from input_pipeline.tokens import TokenWriter
from llvq import checkpointing, encode
from llvq.codec import container, estimate
from llvq.data import ArrayDataset
from llvq.runtime import distributed
from tests import tiny
from tests.runs import create_model, create_state

# With their seeds, no latent of the first two is so near the border of its cell that rounding could
# decide: 1e-5 or more between the squared distances of the nearest two vectors, 6e-4 of a lattice's
# cell. The fine lattice is one where any other rounding makes other codes.
CODEBOOK, LATTICE, FINE_LATTICE = MODELS = ("codebook", "lattice", "fine_lattice")
MOST_CODES = 8  # of the codebook's 15 that are in use

_CONFIGS = {
    CODEBOOK: {"quantizer": "vq", "quantizer.codebook_size": 64, "seed": 8},
    LATTICE: {"quantizer": "dense_lattice", "seed": 10},
    FINE_LATTICE: {"quantizer": "dense_lattice", "seed": 10},
}
_BASIS_SCALES = {LATTICE: 1e-2, FINE_LATTICE: 1e-6}


def config(name, **overrides):
    return tiny.config(**{**_CONFIGS[name], **overrides})


def images():
    """{split: images}: twelve different ones, the first the most frequent; two not in training."""
    rng = np.random.default_rng(0)
    splits = {"train": (70, 10), "validation": (21, 12), "test": (19, 12)}
    return {
        split: tiny.images(12)[np.minimum(rng.geometric(0.25, count) - 1, kinds - 1)]
        for split, (count, kinds) in splits.items()
    }


_latents = nnx.jit(lambda model, pixels: model.encoder(model.to_floats(pixels)))


def save_checkpoint(name, directory, **overrides):
    """A checkpoint of the model as initialised, but for its quantizer, which uses many codes."""
    made = config(name, **overrides)
    model = create_model(made)
    state = create_state(made)
    own = state.params["quantizer"]
    if name == CODEBOOK:
        pixels = np.concatenate(list(images().values()))
        latents = np.asarray(_latents(model, pixels), np.float64).reshape(-1, 8)
        noise = np.random.default_rng(1).standard_normal(own["codebook"].shape)
        own["codebook"] = np.float32(latents.mean(0) + 3 * latents.std(0) * noise)
    else:
        own["basis"] *= np.float32(_BASIS_SCALES[name])
    checkpointing.save_for_inference(directory, state, made)


def run(name, workdir, *, make_writer=TokenWriter, data=None, **options):
    """Encodes with a model; the directory of tokens.

    Shards have two blocks of four images. The codebook's vocabulary lacks some codes.
    """
    data = data or ArrayDataset(**images())
    most_codes = MOST_CODES if name == CODEBOOK else estimate._MOST_CODES
    with (
        mock.patch.object(container, "VECTORS_PER_BLOCK", 4 * 36),
        mock.patch.object(encode, "_BLOCKS_PER_SHARD", 2),
        mock.patch.object(estimate, "_MOST_CODES", most_codes),
    ):
        return Path(encode.encode(workdir, data, make_writer, **options))


def main():
    directory, names, address, count, process_id = sys.argv[1:]
    distributed.initialize(address, int(count), int(process_id))
    for name in names.split(","):
        run(name, Path(directory, name))


if __name__ == "__main__":
    main()
