"""The quantizers, by the names that configs use."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from llvq import fields
from llvq.errors import UserError
from llvq.quantizers.base import Quantizer
from llvq.quantizers.lattice import DenseLatticeQuantizer, LatticeQuantizer
from llvq.quantizers.vq import VectorQuantizer
from llvq.quantizers.vq_ema import EMAVectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "vq_ema": EMAVectorQuantizer,
    "sparse_lattice": LatticeQuantizer,
    "dense_lattice": DenseLatticeQuantizer,
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
    if set(options) != set(known):
        raise UserError(
            f"config.quantizer has the options {', '.join(sorted(options)) or 'none'}, but {name} "
            f"takes {', '.join(known)}: name the quantizer in the config argument "
            f"(configs/….py:{name})"
        )
    fields.check(options, {option: range_ for option, (_, range_) in known.items()}, "quantizer.")


def create(
    name: str,
    latent_dim: int,
    *,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> Quantizer:
    """The quantizer of a name, for latents of latent_dim entries.

    Raises:
      UserError: if there is no quantizer of that name.
    """
    # The registered classes share this signature; the base class has no constructor to say so.
    constructor: Any = quantizer_class(name)
    return constructor(latent_dim, param_dtype=param_dtype, rngs=rngs, **options)
