"""The reference data beside the checkout, where there is any: see tests/test_golden.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1].parent / "shared" / "reference"

needs_reference = pytest.mark.skipif(
    not ROOT.exists(), reason="needs the reference data in ../shared/reference"
)

# (data set, quantizer) of this project: the names of the authors' files.
FILES = {
    ("fashion_mnist", "vq"): ("fashion-mnist", "vq"),
    ("fashion_mnist", "vq_ema"): ("fashion-mnist", "vq-ema"),
    ("fashion_mnist", "sparse_lattice"): ("fashion-mnist", "sparse_lattice"),
    ("fashion_mnist", "dense_lattice"): ("fashion-mnist", "dense_lattice"),
    ("ffhq1024", "vq"): ("ffhq1024", "vq"),
    ("ffhq1024", "sparse_lattice"): ("ffhq1024", "sparse_lattice"),
}


def golden(dataset: str, quantizer: str) -> dict[str, np.ndarray]:
    """What the authors' program computed."""
    with np.load(ROOT / "golden" / "{}_{}.npz".format(*FILES[dataset, quantizer])) as file:
        return dict(file)


def expected() -> dict[str, Any]:
    """What the authors published, and what their weights give on the real FashionMNIST."""
    return json.loads((ROOT / "expected.json").read_text())


def checkpoint(dataset: str, quantizer: str) -> Path:
    """The authors' released file."""
    return ROOT / "checkpoints" / "{}/{}.ckpt".format(*FILES[dataset, quantizer])


def state_dict(dataset: str, quantizer: str) -> dict[str, np.ndarray]:
    """The authors' released weights; skips the test where there is no PyTorch to read them."""
    torch = pytest.importorskip("torch", reason="needs PyTorch to read the authors' weights")
    file = torch.load(checkpoint(dataset, quantizer), map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in file["state_dict"].items()}
