"""Quantizers: maps of latent vectors to a discrete set. `base` is their contract."""

from llvq.quantizers.base import Frozen, Quantizer, QuantizerOutput, Statistic
from llvq.quantizers.bsq import BSQ
from llvq.quantizers.fsq import FSQ
from llvq.quantizers.lattice import DenseLattice, SparseLattice
from llvq.quantizers.learned_lattice import LearnedLattice
from llvq.quantizers.lfq import LFQ
from llvq.quantizers.multirate_lattice import MultirateLattice
from llvq.quantizers.registry import QUANTIZERS, Entry, create
from llvq.quantizers.residual_vq import ResidualVQ
from llvq.quantizers.scaled_lattice import D4Lattice, DiagonalLattice, E8Lattice, LeechLattice
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VQ
from llvq.quantizers.vq_ema import VQEMA

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "VQEMA",
    "D4Lattice",
    "DenseLattice",
    "DiagonalLattice",
    "E8Lattice",
    "Entry",
    "Frozen",
    "LearnedLattice",
    "LeechLattice",
    "MultirateLattice",
    "Quantizer",
    "QuantizerOutput",
    "ResidualVQ",
    "SimVQ",
    "SparseLattice",
    "Statistic",
    "create",
]
