"""A model, a data set and a config small enough for tests."""

from typing import Any

import numpy as np
from flax import nnx

from llvq.config import make_config, to_dict
from llvq.data import ArrayDataset
from llvq.models import NETWORKS, VQVAE
from llvq.quantizers import QUANTIZERS

NAMES = tuple(QUANTIZERS)
# Those that are not another one with another lattice in it.
DISTINCT = tuple(n for n in NAMES if n not in ("diagonal_lattice", "d4_lattice", "leech_lattice"))
PAPER = ("vq", "vq_ema", "sparse_lattice", "dense_lattice")

# Options that suit latents of 8 numbers.
OPTIONS: dict[str, dict[str, Any]] = {
    "fsq": {"levels": (3, 4, 2, 5, 3, 2, 8, 3)},
    "lfq": {"codebook_size": 256},
    "bsq": {"num_bits": 8},
    "simvq": {"codebook_size": 64},
    "residual_vq": {"depth": 2, "codebook_size": 16},
}


def latent_dim(quantizer: str) -> int:
    """The length of a latent vector that suits a quantizer with these options."""
    return 24 if quantizer == "leech_lattice" else 8


def config(quantizer: str, **overrides: Any) -> dict[str, Any]:
    """A config of 6 steps for images of 12×12×1; dotted names override, e.g. **{"model.x": 1}."""
    fields = to_dict(
        make_config(
            quantizer,
            "paper",
            seed=3,
            batch_size=16,
            num_epochs=1,
            num_train_steps=6,
            schedule="constant",
            log_every_steps=2,
            eval_every_steps=2,
            checkpoint_every_steps=2,
            dataset={"name": "tiny"},
            image_shape=(12, 12, 1),
            value_range=(-0.5, 0.5),
            hidden_dims=(8,),
            latent_dim=latent_dim(quantizer),
            quantizer=OPTIONS.get(quantizer, {}),
        )
    )
    for name, value in overrides.items():
        *path, field = name.split(".")
        section = fields
        for key in path:
            section = section[key]
        section[field] = value
    return fields


def images(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random images: waves of random direction and phase, uint8 [count, 12, 12, 1]."""
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(0, 0.8, (2, count, 1, 1)), rng.uniform(0, 6.3, (count, 1, 1))
    y, x = np.mgrid[:12, :12]
    waves = np.sin(frequency[0] * x + frequency[1] * y + phase)
    return np.rint(127.5 * (1 + waves)).astype(np.uint8)[..., None]


def dataset() -> ArrayDataset:
    """70 training, 21 validation and 19 test images: no batch of 16 divides any of them."""
    return ArrayDataset(train=images(70), validation=images(21, 1), test=images(19, 2))


def paper_model(quantizer, *, channels=1, hidden_dims=(64,), value_range=(0.0, 1.0), **options):
    """The paper's network around a quantizer."""
    encoder, decoder = NETWORKS["paper"](
        image_shape=(None, None, channels),
        latent_dim=quantizer.latent_dim,
        hidden_dims=hidden_dims,
        **{"rngs": nnx.Rngs(0), **options},
    )
    return VQVAE(encoder, quantizer, decoder, value_range=value_range, image_channels=channels)
