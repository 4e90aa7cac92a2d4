"""A code model of the density that some lattices learn: no counts say what a code costs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llvq.codec.code_model import CodeModel, frequencies
from llvq.quantizers import Quantizer

_RESOLUTION = 2**40


def with_density(code_model: CodeModel, quantizer: Quantizer) -> CodeModel | None:
    """A code model whose codes cost what the quantizer's density says.

    An escape costs what probability is left. Where the density times the cells' volumes adds up to
    more than 1, all of it is scaled down. The tables for contexts and for escaped codes remain.

    Args:
      code_model: has the vocabulary.
      quantizer: whose codes they are.

    Returns:
      None if the quantizer learns no density.
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
