"""The quantizers, by the names that configs use."""

import inspect
from typing import Any

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

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


def _quantizer_class(name: str) -> type[Quantizer]:
    if name not in QUANTIZERS:
        raise UserError(f"unknown quantizer {name!r}: choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def default_options(name: str) -> dict[str, Any]:
    """The options of a quantizer and their defaults, as a config's `quantizer` section lists them.

    Raises:
      UserError: if there is no quantizer of that name.
    """
    parameters = inspect.signature(_quantizer_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, int | float)}


def create(
    name: str,
    latent_dim: int,
    *,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options: float,
) -> Quantizer:
    """The quantizer of a name, for latents of latent_dim entries.

    Raises:
      UserError: if there is no quantizer of that name.
    """
    # The registered classes share this signature; the base class has no constructor to say so.
    quantizer_class: Any = _quantizer_class(name)
    return quantizer_class(latent_dim, param_dtype=param_dtype, rngs=rngs, **options)


__all__ = [
    "QUANTIZERS",
    "DenseLatticeQuantizer",
    "EMAVectorQuantizer",
    "LatticeQuantizer",
    "Quantizer",
    "VectorQuantizer",
    "create",
    "default_options",
]
