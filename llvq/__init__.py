"""LL-VQ-VAE: vector-quantized autoencoders with a learnable lattice, in JAX."""

from llvq.model import VQVAE
from llvq.quantizers import (
    DenseLatticeQuantizer,
    EMAVectorQuantizer,
    LatticeQuantizer,
    Quantizer,
    VectorQuantizer,
)

__all__ = [
    "VQVAE",
    "DenseLatticeQuantizer",
    "EMAVectorQuantizer",
    "LatticeQuantizer",
    "Quantizer",
    "VectorQuantizer",
]
