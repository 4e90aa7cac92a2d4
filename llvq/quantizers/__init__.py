"""Quantizers: maps of latent vectors to a discrete set. `base` is their contract."""

from llvq.quantizers.base import Quantizer
from llvq.quantizers.bsq import BSQ
from llvq.quantizers.fsq import FSQ
from llvq.quantizers.lattice import DenseLatticeQuantizer, LatticeQuantizer
from llvq.quantizers.learned_lattice import LearnedLattice
from llvq.quantizers.lfq import LFQ
from llvq.quantizers.multirate_lattice import MultirateLattice
from llvq.quantizers.registry import (
    QUANTIZERS,
    check_options,
    create,
    default_options,
    resolve_latent_dim,
)
from llvq.quantizers.residual_vq import ResidualVQ
from llvq.quantizers.scaled_lattice import D4Lattice, DiagonalLattice, E8Lattice, LeechLattice
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VectorQuantizer
from llvq.quantizers.vq_ema import EMAVectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "D4Lattice",
    "DenseLatticeQuantizer",
    "DiagonalLattice",
    "E8Lattice",
    "EMAVectorQuantizer",
    "LatticeQuantizer",
    "LearnedLattice",
    "LeechLattice",
    "MultirateLattice",
    "Quantizer",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantizer",
    "check_options",
    "create",
    "default_options",
    "resolve_latent_dim",
]
