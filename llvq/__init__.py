"""LL-VQ-VAE: vector-quantized autoencoders with a learnable lattice, in JAX."""

from llvq.models.vqvae import VQVAE
from llvq.pretrained import load_pretrained, pretrained_index
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
    "load_pretrained",
    "pretrained_index",
]
