"""The quantizers, by the names that configs use."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from llvq import fields
from llvq.errors import UserError
from llvq.quantizers.base import Quantizer
from llvq.quantizers.bsq import BSQ
from llvq.quantizers.fsq import FSQ
from llvq.quantizers.lattice import DenseLatticeQuantizer, LatticeQuantizer
from llvq.quantizers.learned_lattice import LearnedLattice
from llvq.quantizers.lfq import LFQ
from llvq.quantizers.multirate_lattice import MultirateLattice
from llvq.quantizers.residual_vq import ResidualVQ
from llvq.quantizers.scaled_lattice import D4Lattice, DiagonalLattice, E8Lattice, LeechLattice
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VectorQuantizer
from llvq.quantizers.vq_ema import EMAVectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "vq_ema": EMAVectorQuantizer,
    "sparse_lattice": LatticeQuantizer,
    "dense_lattice": DenseLatticeQuantizer,
    "fsq": FSQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "simvq": SimVQ,
    "residual_vq": ResidualVQ,
    "diagonal_lattice": DiagonalLattice,
    "d4_lattice": D4Lattice,
    "e8_lattice": E8Lattice,
    "leech_lattice": LeechLattice,
    "learned_lattice": LearnedLattice,
    "multirate_lattice": MultirateLattice,
}


def quantizer_class(name: str) -> type[Quantizer]:
    """The class of a quantizer.

    Raises:
      UserError: if there is no quantizer of that name.
    """
    if name not in QUANTIZERS:
        raise UserError(f"unknown quantizer {name!r}: choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def default_options(name: str) -> dict[str, Any]:
    """The options of a quantizer with their defaults.

    Raises:
      UserError: if there is no quantizer of that name.
    """
    options = fields.options(quantizer_class(name).__init__)
    return {option: default for option, (default, _) in options.items()}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError unless these are all options of a quantizer, each within its range."""
    known = fields.options(quantizer_class(name).__init__)
    differing = sorted(set(options) ^ set(known))
    if differing:
        option = differing[0]
        wrong = "is no option" if option in options else "is missing"
        raise UserError(
            f"config.quantizer.{option} {wrong}: {name} takes {', '.join(known)}; for another "
            f"quantizer, name it in the config argument (configs/….py:{name})"
        )
    fields.check(options, {option: range_ for option, (_, range_) in known.items()}, "quantizer.")


def resolve_latent_dim(name: str, options: Mapping[str, Any], latent_dim: int) -> int:
    """The length of latents for a quantizer with these options; 0 stands for the quantizer's own.

    Raises:
      UserError: if the options determine another length.
    """
    quantizer = quantizer_class(name)
    fixed = quantizer.fixed_latent_dim(options)
    if fixed is None:
        unit = quantizer.latent_dim_unit(options)
        expected = f"a multiple of {unit}, the entries that {name} quantizes together"
        is_possible = latent_dim >= 0 and latent_dim % unit == 0
        fields.require(is_possible, "model.latent_dim", latent_dim, expected)
        return latent_dim or -(-quantizer.default_latent_dim // unit) * unit
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
    """The quantizer of a name, for latents of latent_dim entries (0: as many as it needs).

    Raises:
      UserError: if there is no quantizer of that name, or it lacks an option, takes another value
        of one, or needs another latent_dim.
    """
    options = default_options(name) | options
    check_options(name, options)
    latent_dim = resolve_latent_dim(name, options, latent_dim)
    # The registered classes share these signatures; the base class has no constructor to say so.
    constructor: Any = quantizer_class(name)
    if constructor.fixed_latent_dim(options) is None:
        constructor = functools.partial(constructor, latent_dim)
    return constructor(param_dtype=param_dtype, rngs=rngs, **options)
