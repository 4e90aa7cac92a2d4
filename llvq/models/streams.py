"""Streams of random numbers, all from a run's seed.

Each stream draws as if the others did not exist, so that runs of one seed share their network and
their input order whatever the quantizer: comparisons are paired.
"""

import jax
from jaxtyping import Array, Key

NETWORK = 2**31 - 3  # the initial parameters of encoder and decoder
QUANTIZER = 2**31 - 2  # those of the quantizer
TRAINING = 2**31 - 1  # what is random in training


def key(seed: int, stream: int) -> Key[Array, ""]:
    """Returns the key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), stream)
