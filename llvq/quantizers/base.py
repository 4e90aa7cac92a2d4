"""Contract of all quantizers.

    quantized, codes, loss, metrics = quantizer(latents)

`latents` are [..., latent_dim]. `codes` are int32, and `quantizer.lookup(codes)` reconstructs
`quantized`, in param_dtype, unless a lattice trains with noise. The gradient of `quantized` passes
to `latents` by the straight-through estimator. `loss` is a scalar: add it to the objective.

`metrics` are scalars to log. Parts of the loss, each before its weight, are `codebook_loss`,
`commitment_loss`, `entropy`, `batch_entropy`, `basis_l1` and `rate`. Diagnostics, which no weight
brings into the loss, are `distortion`, `second_moment`, `active_dimensions`, and `rate_N` and
`distortion_N` of a lattice of several rates.

`quantized` has the dtype of `latents`, but all arithmetic is in float32 at least: lattice codes
reach 1e7.
"""

import abc
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Integer, Number, checked

# Options that several quantizers share, with the paper's defaults.
CodebookSize = Annotated[int, Integer(2, 2**24)]
CODEBOOK_SIZE = 512
CommitmentCost = Annotated[float, Number(0)]
COMMITMENT_COST = 0.25

Metrics = dict[str, Float[Array, ""]]


class Statistic(nnx.Variable[Array]):
    """A variable learned without gradients, such as a moving average or an EMA codebook."""


class Frozen(nnx.Variable[Array]):
    """A variable that is drawn once and never changes."""


class QuantizerOutput(NamedTuple):
    """Result of a quantizer's call.

    Attributes:
      quantized: in the latents' shape and dtype.
      codes: int32 [batch, ..., *code_shape].
      loss: the scalar to add to the objective; 0 where there is none.
      metrics: scalars by name.
    """

    quantized: Float[Array, "batch ... latent_dim"]
    codes: Int[Array, "batch ..."]
    loss: Float[Array, ""]
    metrics: Metrics


class Quantizer(nnx.Module):
    """A map of latent vectors to a discrete set, learned with the network around it."""

    latent_dim: int
    code_shape: tuple[int, ...]
    """The shape of one latent vector's code: () for an index, (n,) for n integers."""
    levels: tuple[int, ...] | None = None
    """The number of values of each integer of a code, from 0 on; None if any int32 is possible."""
    param_dtype: DTypeLike
    """The dtype of parameters and arithmetic."""
    num_shares: int = 1
    """Into how many equal parts the devices split a batch."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes constructors check the options that are annotated with a range."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked(cls.__init__))  # noqa: B010

    @classmethod
    def fixed_latent_dim(cls, options: Mapping[str, Any]) -> int | None:
        """Returns the latent_dim that these options determine, or None if any is possible.

        Args:
          options: of the constructor, all of them.
        """
        del options
        return None

    @classmethod
    def latent_dim_unit(cls, options: Mapping[str, Any]) -> int:
        """Returns the number of which latent_dim must be a multiple, given these options."""
        del options
        return 1

    @property
    def code_width(self) -> int:
        """The number of integers in the code of one latent vector."""
        return math.prod(self.code_shape)

    @property
    def num_codes(self) -> int | None:
        """The number of different codes; None if there is no limit, as for lattices."""
        return None if self.levels is None else math.prod(self.levels)

    @abc.abstractmethod
    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        """Returns (quantized latents, codes), differentiable in the quantizer's parameters."""

    @abc.abstractmethod
    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        """Returns the quantized latents of codes."""

    def losses(
        self,
        latents: Float[Array, "... latent_dim"],
        quantized: Float[Array, "... latent_dim"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns (loss, metrics); by default there is no loss.

        Args:
          latents: as `prepare` returns them.
          quantized: as `quantize` returns them.
          where: the latents that count, in a shape that broadcasts; None if all do.
        """
        del latents, quantized, where
        return jnp.zeros((), self.param_dtype), {}

    def prepare(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        """Transforms the latents before they are quantized, differentiably."""
        return latents

    def initialize(
        self,
        latents: Float[Array, "... latent_dim"],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        """Sees every training batch before it is quantized; may initialize from the first."""
        del latents, mask, key

    def update_statistics(
        self,
        latents: Float[Array, "... latent_dim"],
        codes: Int[Array, "..."],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        """Sees every training batch after it is quantized; may learn without gradients."""
        del latents, codes, mask, key

    def forward(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool,
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> QuantizerOutput:
        """Does what `__call__` does, for prepared latents in param_dtype.

        `quantized` comes without the gradient to the latents, which `pass_gradient` adds.
        """
        if train:
            self.initialize(jax.lax.stop_gradient(latents), mask, key)
        quantized, codes = self.quantize(latents)
        where = None if mask is None else by_example(mask, latents)
        loss, metrics = self.losses(latents, quantized, where)
        if train:
            self.update_statistics(jax.lax.stop_gradient(latents), codes, mask, key)
        return QuantizerOutput(quantized, codes, loss, metrics)

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        """Gives the quantized latents a gradient with respect to the latents."""
        return straight_through(quantized, latents)

    def __call__(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          latents: [batch, ..., latent_dim].
          train: whether to update what is learned without gradients. An initialization from the
            first batch takes effect in this call, every other update in the next one.
          mask: [batch], the examples that count in loss, metrics and statistics; all by default.
          key: the random key of a training call. Only some options need one.

        Raises:
          ValueError: if the last axis of `latents` is not latent_dim long, or if an option needs a
            key in training and there is none.
        """
        if latents.shape[-1] != self.latent_dim:
            raise ValueError(
                f"latents {latents.shape} must end in latent_dim={self.latent_dim}: "
                f"{type(self).__name__} quantizes the last axis"
            )
        dtype = latents.dtype
        latents = self.prepare(jnp.asarray(latents, self.param_dtype))
        output = self.forward(latents, train=train, mask=mask, key=key)
        quantized = self.pass_gradient(output.quantized, latents)
        return output._replace(quantized=quantized.astype(dtype))

    def code_length(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "..."] | None:
        """Returns the bits of quantized latents under the quantizer's learned density, or None."""
        del points
        return None

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        """Returns arrays to log as histograms, by name, given the codes of some images."""
        return {"codes": codes}

    def codes_to_indices(self, codes: Int[Array, "..."]) -> Int[Array, "..."]:
        """Flattens codes to one index per latent vector, from 0 to num_codes − 1.

        The first integer of a code varies fastest.

        The −1 of a stage that `ResidualVQ` dropped in training has no index.

        Raises:
          ValueError: if the quantizer has 2³¹ codes or more.
        """
        if not self.code_shape:
            return codes
        return jnp.sum(codes * self._place_values(), axis=-1, dtype=jnp.int32)

    def unflatten_codes(self, indices: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the codes of indices: the inverse of `codes_to_indices`.

        Raises:
          ValueError: if the quantizer has 2³¹ codes or more.
        """
        if not self.code_shape:
            return indices
        digits = indices[..., None] // self._place_values()
        return digits % jnp.array(self.levels, jnp.int32)

    def _place_values(self) -> Int[Array, "width"]:
        if self.levels is None or self.num_codes is None or self.num_codes >= 2**31:
            count = "infinitely many" if self.num_codes is None else self.num_codes
            raise ValueError(
                f"{type(self).__name__} has {count} codes: an int32 can index fewer than 2**31"
            )
        return jnp.asarray(np.cumprod([1, *self.levels[:-1]]), jnp.int32)


def by_example(mask: Bool[Array, "batch"], like: Array) -> Bool[Array, "batch ..."]:
    """Reshapes a mask of examples to broadcast with an array [batch, ...]."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def both(
    mask: Bool[Array, "batch"] | None, other: Bool[Array, "batch"] | None
) -> Bool[Array, "batch"] | None:
    """Intersects two masks of examples; None stands for all."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def straight_through(
    quantized: Float[Array, "..."], latents: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns `quantized`, with the gradient of `latents`."""
    return jax.lax.stop_gradient(quantized) + (latents - jax.lax.stop_gradient(latents))


def mean(values: Float[Array, "..."], where: Bool[Array, "..."] | None) -> Float[Array, ""]:
    """Averages the values that count; 0 if none does."""
    if where is None:
        return jnp.mean(values)
    # Counted before it is broadcast: the number of elements may exceed an int32.
    count = jnp.sum(where).astype(values.dtype) * (values.size / where.size)
    return jnp.sum(values, where=where) / jnp.maximum(count, 1)


def distances(
    latents: Float[Array, "..."],
    quantized: Float[Array, "..."],
    where: Bool[Array, "..."] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (codebook loss, commitment loss), two means of squares of the same value.

    The gradient of the first moves the quantizer towards the latents, that of the second the
    latents towards the quantizer (van den Oord et al. 2017, eq. 3).
    """
    return (
        mean((quantized - jax.lax.stop_gradient(latents)) ** 2, where),
        mean((latents - jax.lax.stop_gradient(quantized)) ** 2, where),
    )


def codebook_losses(
    latents: Float[Array, "..."],
    quantized: Float[Array, "..."],
    where: Bool[Array, "..."] | None,
    commitment_cost: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns (VQ-VAE's loss, its parts): codebook loss + commitment cost × commitment loss."""
    codebook_loss, commitment_loss = distances(latents, quantized, where)
    parts = {"codebook_loss": codebook_loss, "commitment_loss": commitment_loss}
    return codebook_loss + commitment_cost * commitment_loss, parts
