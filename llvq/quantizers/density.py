"""A learnable density of vectors, which prices the points of a lattice.

The entries of a vector are independent, and each has a mixture of logistic distributions, as in
learned image compression (Ballé et al. 2018, arXiv 1802.01436, with mixtures as in Cheng et al.
2020, arXiv 2001.01568).
"""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# The parameters are stored divided by this, so that Adam, whose steps all have one size, moves them
# this many times as far as the network's. While the density is still far behind the latents, the
# rate says more about the density than about them.
SPEED = 30.0
_COMPONENTS = 3  # of each mixture


class LogisticMixtures(nnx.Module):
    """A mixture of logistic distributions for each entry of a vector.

    Attributes:
      weights: [dim, components], logarithms, up to a constant.
      means: [dim, components].
      log_scales: [dim, components].
    """

    def __init__(self, dim: int, *, param_dtype: DTypeLike) -> None:
        """Starts with components of equal weight and scale 1, their means evenly over ±1."""
        shape = dim, _COMPONENTS
        means = jnp.broadcast_to(jnp.linspace(-1, 1, _COMPONENTS), shape)
        self.weights = nnx.Param(jnp.zeros(shape, param_dtype))
        self.means = nnx.Param(jnp.asarray(means / SPEED, param_dtype))
        self.log_scales = nnx.Param(jnp.zeros(shape, param_dtype))

    def _standardized(
        self, values: Float[Array, "... dim"]
    ) -> tuple[Float[Array, "... dim k"], Float[Array, "dim k"], Float[Array, "dim k"]]:
        """Returns (distances from each component's mean in its scale, log weights, log scales)."""
        log_scales = SPEED * self.log_scales[...]
        distances = (values[..., None] - SPEED * self.means[...]) * jnp.exp(-log_scales)
        return distances, jax.nn.log_softmax(SPEED * self.weights[...]), log_scales

    def log_density(self, values: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Returns the logarithm of each entry's density."""
        distances, log_weights, log_scales = self._standardized(values)
        logs = jax.nn.log_sigmoid(distances) + jax.nn.log_sigmoid(-distances)
        return jax.nn.logsumexp(log_weights + logs - log_scales, axis=-1)

    def log_probability(
        self, values: Float[Array, "... dim"], widths: Float[Array, "dim"]
    ) -> Float[Array, "... dim"]:
        """Returns the logarithm of each entry's probability to lie within values ± widths / 2."""
        distances, log_weights, log_scales = self._standardized(values)
        width = widths[:, None] * jnp.exp(-log_scales)
        low, high = distances - width / 2, distances + width / 2
        # σ(b) − σ(a) = σ(b)·σ(−a)·(1 − exp(a − b)), without cancellation in either tail.
        logs = jax.nn.log_sigmoid(high) + jax.nn.log_sigmoid(-low) + jnp.log(-jnp.expm1(-width))
        return jax.nn.logsumexp(log_weights + logs, axis=-1)
