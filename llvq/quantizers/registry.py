"""The quantizers, by the names that configs use: class names in snake case."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from llvq import fields
from llvq.quantizers.base import Quantizer
from llvq.quantizers.bsq import BSQ
from llvq.quantizers.fsq import FSQ
from llvq.quantizers.lattice import DenseLattice, SparseLattice
from llvq.quantizers.learned_lattice import LearnedLattice
from llvq.quantizers.lfq import LFQ
from llvq.quantizers.multirate_lattice import MultirateLattice
from llvq.quantizers.residual_vq import ResidualVQ
from llvq.quantizers.scaled_lattice import D4Lattice, DiagonalLattice, E8Lattice, LeechLattice
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VQ
from llvq.quantizers.vq_ema import VQEMA


class Entry(NamedTuple):
    """A quantizer and what a config of it has by default.

    Attributes:
      constructor: the class; the parameters with a range in their annotation are its options.
      latent_dim: of a config that names none, if the options do not determine it.
      paper: the fields of a config that the recipe `paper` sets for this quantizer alone.
      standard: the options that the recipe `standard` sets, against codebook collapse.
    """

    constructor: type[Quantizer]
    latent_dim: int = 64
    paper: Mapping[str, Any] = {}
    standard: Mapping[str, Any] = {}


_RESTARTS = {"restart_threshold": 0.1, "initialization": "batch"}
# The authors ran 5 epochs with a learning rate of exactly 0 from the second on. Only what is
# learned without gradients notices those.
_FIVE_EPOCHS = {"num_epochs": 5, "schedule": "first_epoch"}

QUANTIZERS: dict[str, Entry] = {
    "vq": Entry(VQ, standard=_RESTARTS),
    "vq_ema": Entry(VQEMA, paper=_FIVE_EPOCHS, standard=_RESTARTS),
    "sparse_lattice": Entry(SparseLattice),
    "dense_lattice": Entry(DenseLattice),
    "fsq": Entry(FSQ),
    "lfq": Entry(LFQ),
    "bsq": Entry(BSQ),
    "simvq": Entry(SimVQ),
    "residual_vq": Entry(ResidualVQ),
    "diagonal_lattice": Entry(DiagonalLattice, latent_dim=8),
    "d4_lattice": Entry(D4Lattice, latent_dim=8),
    "e8_lattice": Entry(E8Lattice, latent_dim=8),
    "leech_lattice": Entry(LeechLattice, latent_dim=24),
    "learned_lattice": Entry(LearnedLattice, latent_dim=8),
    "multirate_lattice": Entry(MultirateLattice, latent_dim=8),
}


def complete(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of a quantizer: those given, and the defaults of the others.

    Raises:
      UserError: if there is no such quantizer or option, or a value is beyond its range.
    """
    constructor = fields.entry(QUANTIZERS, name, "quantizer").constructor
    return fields.complete(constructor, options, "quantizer.", name)


def loss_warmup(options: Mapping[str, Any]) -> float:
    """Returns the share of a training over which the weight of the quantizer's loss rises to 1."""
    return options.get("warmup", 0.0)


def resolve_latent_dim(name: str, options: Mapping[str, Any], latent_dim: int) -> int:
    """Returns the length of latents for a quantizer; a latent_dim of 0 leaves it to the quantizer.

    Raises:
      UserError: if the options determine another length.
    """
    entry = fields.entry(QUANTIZERS, name, "quantizer")
    fixed = entry.constructor.fixed_latent_dim(options)
    if fixed is None:
        unit = entry.constructor.latent_dim_unit(options)
        expected = f"a multiple of {unit}, the entries that {name} quantizes together"
        is_possible = latent_dim >= 0 and latent_dim % unit == 0
        fields.require(is_possible, "model.latent_dim", latent_dim, expected)
        return latent_dim or -(-entry.latent_dim // unit) * unit
    expected = f"{fixed}, which follows from the options of {name}, or 0"
    fields.require(latent_dim in (0, fixed), "model.latent_dim", latent_dim, expected)
    return fixed


def create(
    name: str,
    latent_dim: int,
    *,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> Quantizer:
    """Makes a quantizer by its name, for latents of latent_dim entries (0: as many as it needs).

    Raises:
      UserError: if there is no quantizer of that name, or it lacks an option, takes another value
        of one, or needs another latent_dim.
    """
    options = complete(name, options)
    latent_dim = resolve_latent_dim(name, options, latent_dim)
    # The registered classes share these signatures; the base class has no constructor to say so.
    constructor: Any = QUANTIZERS[name].constructor
    if constructor.fixed_latent_dim(options) is None:
        constructor = functools.partial(constructor, latent_dim)
    return constructor(param_dtype=param_dtype, rngs=rngs, **options)
