"""LL-VQ-VAE: vector-quantized autoencoders with a learnable lattice, in JAX.

`import llvq` imports nothing else; each name below is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llvq.codec import Codec
    from llvq.models import VQVAE
    from llvq.pretrained import load_pretrained, pretrained_index
    from llvq.quantizers import (
        BSQ,
        FSQ,
        LFQ,
        VQ,
        VQEMA,
        D4Lattice,
        DenseLattice,
        DiagonalLattice,
        E8Lattice,
        LearnedLattice,
        LeechLattice,
        MultirateLattice,
        Quantizer,
        ResidualVQ,
        SimVQ,
        SparseLattice,
    )

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "VQ",
    "VQEMA",
    "VQVAE",
    "Codec",
    "D4Lattice",
    "DenseLattice",
    "DiagonalLattice",
    "E8Lattice",
    "LearnedLattice",
    "LeechLattice",
    "MultirateLattice",
    "Quantizer",
    "ResidualVQ",
    "SimVQ",
    "SparseLattice",
    "load_pretrained",
    "pretrained_index",
]

_MODULES = {
    "Codec": "llvq.codec",
    "VQVAE": "llvq.models",
    "load_pretrained": "llvq.pretrained",
    "pretrained_index": "llvq.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llvq' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "llvq.quantizers")), name)
