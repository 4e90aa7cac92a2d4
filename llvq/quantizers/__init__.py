"""Quantizers: maps of latent vectors to a discrete set. `base` is their contract."""

from llvq.quantizers.base import Quantizer
from llvq.quantizers.lattice import DenseLatticeQuantizer, LatticeQuantizer
from llvq.quantizers.registry import QUANTIZERS, check_options, create, default_options
from llvq.quantizers.vq import VectorQuantizer
from llvq.quantizers.vq_ema import EMAVectorQuantizer

__all__ = [
    "QUANTIZERS",
    "DenseLatticeQuantizer",
    "EMAVectorQuantizer",
    "LatticeQuantizer",
    "Quantizer",
    "VectorQuantizer",
    "check_options",
    "create",
    "default_options",
]
