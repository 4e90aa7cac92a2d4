"""Makes a code model of the density that some lattices learn, instead of counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llvq.codec.code_model import CodeModel, frequencies
from llvq.quantizers import Quantizer

_RESOLUTION = 2**40


def with_density(code_model: CodeModel, quantizer: Quantizer) -> CodeModel | None:
    """Replaces the frequencies of the vocabulary by the quantizer's density.

    The escape gets the remaining probability. If the density times the cells' volumes adds up to
    more than 1, all of it is scaled down. The tables for contexts and for escaped codes remain.

    Args:
      code_model: a code model with the vocabulary.
      quantizer: the quantizer behind the codes.

    Returns:
      A new code model, or None if the quantizer does not learn a density.
    """
    codes = code_model.vocabulary.reshape(-1, *quantizer.code_shape)
    bits = quantizer.code_length(quantizer.lookup(jnp.asarray(codes)))
    if bits is None:
        return None
    shares = 2.0 ** -np.asarray(bits, np.float64)
    total = float(shares.sum())
    shares = np.append(shares, max(1.0 - total, 0.0)) / max(total, 1.0)
    shares = frequencies(np.rint(_RESOLUTION * shares).astype(np.int64))
    return dataclasses.replace(code_model, frequencies=shares)
