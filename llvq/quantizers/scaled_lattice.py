"""Lattices with a learnable step for each block of latents: Z, D4, E8 and Leech."""

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

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


class ScaledLattice(RateLattice):
    """A fixed lattice in each block of the latents, times the block's step."""

    def __init__(
        self,
        latent_dim: int,
        *,
        rate_weight: RateWeight = RATE_WEIGHT,
        warmup: Warmup = WARMUP,
        initial_step: InitialStep = INITIAL_STEP,
        training: Training = TRAINING,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Makes the lattice.

        Args:
          latent_dim: of the latents, a multiple of the lattice's dimension.
          rate_weight: λ, in units of the loss per bit.
          warmup: the share of training over which λ rises from 0.
          initial_step: what the lattice, in its usual scaling, is first multiplied by.
          training: see `RateLattice`.
          param_dtype: of the parameters.
          rngs: not needed, since nothing is drawn.
        """
        del rngs
        self._set_up(
            latent_dim,
            self.lattice.dimension,
            latent_dim // self.lattice.dimension,
            rate_weight=rate_weight,
            warmup=warmup,
            initial_step=initial_step,
            training=training,
            param_dtype=param_dtype,
        )

    @classmethod
    def latent_dim_unit(cls, options: Mapping[str, Any]) -> int:
        del options
        return cls.lattice.dimension

    def basis(self) -> Float[Array, "blocks"]:
        """Returns the steps."""
        return self.steps()

    def _entry_steps(self) -> Float[Array, "latent_dim"]:
        return jnp.repeat(self.steps(), self.lattice.dimension)

    def to_cells(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return latents / self._entry_steps()

    def from_cells(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return points * self._entry_steps()

    def from_integers(
        self, points: Float[Array, "... latent_dim"]
    ) -> Float[Array, "... latent_dim"]:
        # One product of an entry, so that no compiler can round it in two ways.
        return points * (self._entry_steps() * self.lattice.step[0])

    def log_volume(self) -> Float[Array, ""]:
        num_blocks = self.latent_dim // self.lattice.dimension
        return jnp.sum(jnp.log(self._entry_steps())) + num_blocks * math.log(self.lattice.volume)


class DiagonalLattice(ScaledLattice):
    """The paper's lattice, a step for each entry, with a rate in the loss."""

    lattice = nearest_point.Z

    def code_length(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "..."]:
        """Returns the bits that each point costs: exact, since cells are boxes."""
        logs = self.density.log_probability(points, self._entry_steps())
        return -jnp.sum(logs, axis=-1) / math.log(2)


class D4Lattice(ScaledLattice):
    """D4: in blocks of four, the integer vectors whose sum is even."""

    lattice = nearest_point.D4


class E8Lattice(ScaledLattice):
    """E8, the densest lattice in eight dimensions."""

    lattice = nearest_point.E8


class LeechLattice(ScaledLattice):
    """The Leech lattice, the densest one in 24 dimensions."""

    lattice = nearest_point.LEECH
