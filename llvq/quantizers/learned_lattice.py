"""A lattice whose whole basis is learned, in blocks of the latents.

B = U·Σ·Vᵀ, with the rows as basis vectors, as in SALVQ (arXiv 2509.13482) and OLVQ (arXiv
2411.16119). U and V stay orthogonal because they are Cayley transforms, (1 − A)·(1 + A)⁻¹ of
antisymmetric matrices A; the entries of Σ stay within bounds.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llvq.fields import Integer
from llvq.quantizers import nearest_point
from llvq.quantizers.rate_lattice import (
    INITIAL_STEP,
    RATE_WEIGHT,
    TRAINING,
    WARMUP,
    InitialStep,
    RateLattice,
    RateWeight,
    Training,
    Warmup,
)

_PRECISION = jax.lax.Precision.HIGHEST


class LearnedLattice(RateLattice):
    """A learned basis for each block; coordinates in it are rounded (Babai's rounding)."""

    lattice = nearest_point.Z

    def __init__(
        self,
        latent_dim: int,
        *,
        block_size: Annotated[int, Integer(1, 64)] = 8,
        rate_weight: RateWeight = RATE_WEIGHT,
        warmup: Warmup = WARMUP,
        initial_step: InitialStep = INITIAL_STEP,
        training: Training = TRAINING,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Makes the lattice: at first the integers times a step.

        Args:
          latent_dim: of the latents, a multiple of `block_size`.
          block_size: entries that share a basis.
          rate_weight: λ, in units of the loss per bit.
          warmup: the share of training over which λ rises from 0.
          initial_step: the first length of the basis vectors.
          training: see `RateLattice`.
          param_dtype: of the parameters.
          rngs: not needed, since nothing is drawn.
        """
        del rngs
        self._set_up(
            latent_dim,
            block_size,
            latent_dim,
            rate_weight=rate_weight,
            warmup=warmup,
            initial_step=initial_step,
            training=training,
            param_dtype=param_dtype,
        )
        self.block_size = block_size
        shape = latent_dim // block_size, block_size, block_size
        self.left, self.right = (nnx.Param(jnp.zeros(shape, param_dtype)) for _ in range(2))

    @classmethod
    def latent_dim_unit(cls, options: Mapping[str, Any]) -> int:
        return options["block_size"]

    def _factors(self) -> tuple[Array, Array, Array]:
        """Returns (U, the diagonal of Σ, V)."""
        steps = self.steps().reshape(-1, self.block_size)
        return cayley(self.left[...]), steps, cayley(self.right[...])

    def basis(self) -> Float[Array, "blocks n n"]:
        """Returns the bases; each row is a basis vector."""
        left, steps, right = self._factors()
        return jnp.einsum("bij,bj,bkj->bik", left, steps, right, precision=_PRECISION)

    def to_cells(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        left, steps, right = self._factors()
        inverse = jnp.einsum("bij,bj,bkj->bik", right, 1 / steps, left, precision=_PRECISION)
        return self._times(latents, inverse)

    def from_cells(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return self._times(points, self.basis())

    def _times(self, vectors: Array, matrices: Float[Array, "blocks n n"]) -> Array:
        blocks = vectors.reshape(*vectors.shape[:-1], -1, self.block_size)
        # Not one product: a sum in a fixed order, so that a code's point is the same in any batch.
        products = (blocks[..., i, None] * matrices[:, i] for i in range(self.block_size))
        return sum(products, start=jnp.zeros((), vectors.dtype)).reshape(vectors.shape)

    def log_volume(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(self.steps()))


def cayley(matrices: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """Makes orthogonal matrices: Cayley transforms of the matrices' antisymmetric parts."""
    skew = (matrices - jnp.swapaxes(matrices, -1, -2)) / 2
    unit = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    # (1 − A) and (1 + A)⁻¹ commute.
    return jnp.linalg.solve(unit + skew, unit - skew)
