"""The learnable lattice of LL-VQ-VAE (Khalil et al. 2023, arXiv 2310.09382).

The lattice is the set of all integer combinations of a diagonal basis: D numbers stand for a
codebook, and quantizing is rounding each coordinate to a multiple of its basis entry.
"""

from typing import Annotated

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.fields import Number
from llvq.quantizers.base import (
    CODEBOOK_SIZE,
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Metrics,
    Quantizer,
    codebook_losses,
)

# Below this a basis entry counts as ±SMALLEST_BASIS, so that nothing divides by zero.
SMALLEST_BASIS = 1e-7
# Codes saturate here: far above any code of a trained model, well inside int32.
LARGEST_CODE = 2**30


def sparse_basis_bound(codebook_size: int, latent_dim: int) -> float:
    """Returns the spacing B at which a unit cube has codebook_size lattice points."""
    return 1.0 / (codebook_size ** (1.0 / latent_dim) - 1.0)


class SparseLattice(Quantizer):
    """The sparse lattice: rounds to a coarse, learnable grid.

    Codes are the integer coordinates in the lattice basis: int32 [batch, ..., latent_dim].

    The basis starts uniform in ±B, B = 1/(K^(1/D) − 1), for a desired codebook size of K, and the
    loss term −γ·Σ|b| with γ > 0 drives it apart, so that few lattice points are in use.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        codebook_size: CodebookSize = CODEBOOK_SIZE,
        gamma: Annotated[float, Number()] = 1.0,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        bound = sparse_basis_bound(codebook_size, latent_dim)
        self._set_up(latent_dim, bound, gamma, commitment_cost, param_dtype, rngs)

    def _set_up(
        self,
        latent_dim: int,
        basis_bound: float,
        gamma: float,
        commitment_cost: float,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.latent_dim = latent_dim
        self.code_shape = (latent_dim,)
        self.gamma = gamma
        self.commitment_cost = commitment_cost
        self.param_dtype = param_dtype
        self.basis = nnx.Param(
            jax.random.uniform(rngs.params(), (latent_dim,), param_dtype, -basis_bound, basis_bound)
        )

    def _sign(self) -> Float[Array, "latent_dim"]:
        return jnp.where(self.basis[...] < 0, -1.0, 1.0).astype(self.param_dtype)

    def effective_basis(self) -> Float[Array, "latent_dim"]:
        """Returns the basis in use: the parameter, kept at least SMALLEST_BASIS away from zero."""
        basis = self.basis[...]
        return jnp.where(jnp.abs(basis) >= SMALLEST_BASIS, basis, self._sign() * SMALLEST_BASIS)

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "... latent_dim"]]:
        reciprocal = 1.0 / jax.lax.stop_gradient(self.effective_basis())
        codes = jnp.round(jax.lax.stop_gradient(latents) * reciprocal)
        codes = jnp.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(jnp.int32)
        return self.lookup(codes), codes

    def lookup(self, codes: Int[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return self.effective_basis() * codes.astype(self.param_dtype)

    def losses(
        self,
        latents: Float[Array, "... latent_dim"],
        quantized: Float[Array, "... latent_dim"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        loss, parts = codebook_losses(latents, quantized, where, self.commitment_cost)
        # The sum is over the parameter, not the basis in use: an entry at zero must still move.
        basis_l1 = jnp.sum(self._sign() * self.basis[...])
        return loss - self.gamma * basis_l1, {**parts, "basis_l1": basis_l1}

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        del codes
        return {"basis": self.basis[...]}


class DenseLattice(SparseLattice):
    """The dense lattice: the loss term −γ·Σ|b| with γ < 0 shrinks the basis towards zero.

    The basis starts uniform in ±1. The lattice becomes so fine that it hardly quantizes.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        gamma: Annotated[float, Number()] = -1.0,
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self._set_up(latent_dim, 1.0, gamma, commitment_cost, param_dtype, rngs)
