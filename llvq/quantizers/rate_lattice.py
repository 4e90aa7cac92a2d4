"""Base class of lattices that learn with a rate in the loss, in place of the paper's −γ·Σ|b|."""

import abc
import functools
import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Number
from llvq.quantizers.base import Quantizer, QuantizerOutput, by_example, mean, straight_through
from llvq.quantizers.density import LogisticMixtures
from llvq.quantizers.nearest_point import Lattice, to_coordinates, to_integers

# Options of these lattices.
RateWeight = Annotated[float, Number(0)]
RATE_WEIGHT = 1e-3
Warmup = Annotated[float, Number(0, 1)]
WARMUP = 0.4
InitialStep = Annotated[float, Number(0, excluded=0)]
INITIAL_STEP = 0.15
Training = Literal["straight_through", "noise", "mixed"]
TRAINING: Training = "noise"

# Steps stay within this factor of where they began, so that no volume runs away.
_LARGEST_CHANGE = 1e3


class RateLattice(Quantizer):
    """A lattice whose points cost bits.

    Codes are integer coordinates in a basis of the lattice: int32 [batch, ..., latent_dim].

    The quantizer's loss is λ times the mean code length of a latent, in bits, under a density that
    is learned with it. A point's probability is the density at the point times its cell's volume,
    unless a subclass integrates the density. The reconstruction loss pulls the other way: its
    gradient reaches the lattice, because a quantization error grows with the cells.

    Attributes:
      lattice: the fixed lattice to which `to_cells` maps this one, in blocks of its dimension.
      rate_weight: λ.
      warmup: the share of training over which the training loop lets the weight of the loss rise
        from 0 to 1. The quantizer does not know how far training is.
      training: how latents are quantized in training. "straight_through" takes the nearest points,
        "noise" adds noise that is uniform over a cell (Ballé et al. 2017, arXiv 1611.01704), and
        "mixed" takes the rate of noisy latents but passes on the nearest points (Minnen and Singh
        2020, arXiv 2007.08739).
    """

    lattice: Lattice

    def _set_up(
        self,
        latent_dim: int,
        unit: int,
        num_steps: int,
        *,
        rate_weight: float,
        warmup: float,
        initial_step: float,
        training: str,
        param_dtype: DTypeLike,
    ) -> None:
        if latent_dim % unit:
            raise ValueError(f"latent_dim={latent_dim}: must be a multiple of {unit}")
        self.latent_dim = latent_dim
        self.code_shape = (latent_dim,)
        self.rate_weight = rate_weight
        self.warmup = warmup
        self.initial_step = initial_step
        self.training = training
        self.param_dtype = param_dtype
        self.log_steps = nnx.Param(jnp.zeros(num_steps, param_dtype))
        self.density = LogisticMixtures(latent_dim, param_dtype=param_dtype)

    def steps(self) -> Float[Array, "num_steps"]:
        """Returns the learned lengths, each within a factor of _LARGEST_CHANGE of its start."""
        bound = math.log(_LARGEST_CHANGE)
        return self.initial_step * jnp.exp(bound * jnp.tanh(self.log_steps[...] / bound))

    @abc.abstractmethod
    def to_cells(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        """Maps this lattice to blocks of `lattice`, linearly."""

    @abc.abstractmethod
    def from_cells(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        """Inverts `to_cells`."""

    def from_integers(
        self, points: Float[Array, "... latent_dim"]
    ) -> Float[Array, "... latent_dim"]:
        """Applies `from_cells` to points of `lattice` in units of its step."""
        return self.from_cells(points)

    @abc.abstractmethod
    def log_volume(self) -> Float[Array, ""]:
        """Returns the natural logarithm of the volume of a latent vector's cell."""

    @abc.abstractmethod
    def basis(self) -> Array:
        """Returns what is learned of the lattice, to be logged in training."""

    def _in_blocks(self, function: Callable[[Array], Array], vectors: Array) -> Array:
        blocks = vectors.reshape(*vectors.shape[:-1], -1, self.lattice.dimension)
        return function(blocks).reshape(vectors.shape)

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "... latent_dim"]]:
        def coordinates(vectors: Array) -> Array:
            return to_coordinates(self.lattice, self.lattice.nearest(vectors))

        codes = self._in_blocks(coordinates, self.to_cells(jax.lax.stop_gradient(latents)))
        return self.lookup(codes), codes

    def lookup(self, codes: Int[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        integers = self._in_blocks(functools.partial(to_integers, self.lattice), codes)
        return self.from_integers(integers.astype(self.param_dtype))

    def code_length(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "..."]:
        """Returns the bits that each point costs."""
        logs = self.density.log_density(points) + self.log_volume() / self.latent_dim
        if self.training == "straight_through":
            # Without noise a density may become as narrow as it likes around a point.
            logs = jnp.minimum(logs, 0)
        return -jnp.sum(logs, axis=-1) / math.log(2)

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        """Adds a gradient that takes the quantization errors as constant shares of a cell."""
        errors = jax.lax.stop_gradient(self.to_cells(quantized - latents))
        return straight_through(quantized, latents + self.from_cells(errors))

    def forward(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool,
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> QuantizerOutput:
        """Quantizes; training with noise returns the noisy latents, not the points.

        `second_moment` is the mean squared error divided by the cell's volume to the power of
        2 / latent_dim. It is the lattice's own, such as 1/12 for rounding, where latents are spread
        evenly over cells, less where they crowd around points, and more where they avoid them.
        """
        quantized, codes = self.quantize(latents)
        rated = quantized
        if train and self.training != "straight_through":
            if key is None:
                raise ValueError(f"training={self.training!r} needs a key in training")
            rated = latents + self.from_cells(self._noise(latents, key))
            if self.training == "noise":
                quantized = rated
        where = None if mask is None else by_example(mask, latents)
        lengths = self.code_length(self.pass_gradient(rated, latents))
        rate = mean(lengths[..., None], where)
        distortion = mean((quantized - latents) ** 2, where)
        metrics = {
            "rate": rate,
            "distortion": distortion,
            "second_moment": distortion / jnp.exp(2 * self.log_volume() / self.latent_dim),
            "active_dimensions": self._active_dimensions(codes, where),
        }
        return QuantizerOutput(quantized, codes, self.rate_weight * rate, metrics)

    def _noise(self, like: Array, key: Key[Array, ""]) -> Float[Array, "... latent_dim"]:
        """Draws vectors uniformly from the cell around 0 of the fixed lattice."""

        def fold(uniform: Array) -> Array:
            vectors = uniform * self.lattice.period.astype(like.dtype)
            return vectors - self.lattice.nearest(vectors)

        return self._in_blocks(fold, jax.random.uniform(key, like.shape, like.dtype))

    def _active_dimensions(
        self, codes: Int[Array, "... latent_dim"], where: Bool[Array, "..."] | None
    ) -> Float[Array, ""]:
        """Counts the integers of a code that vary over the batch."""
        values = codes.astype(self.param_dtype)
        axes = tuple(range(codes.ndim - 1))
        means = jnp.mean(values, axis=axes, where=where, keepdims=True)
        return jnp.sum(jnp.mean((values - means) ** 2, axis=axes, where=where) > 1e-4)

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        del codes
        return {"basis": self.basis()}
