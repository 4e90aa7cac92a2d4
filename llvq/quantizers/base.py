"""The contract that every quantizer keeps.

    quantized, codes, losses = quantizer(latents)

`latents` are [..., latent_dim]. `codes` are int32, and `quantizer.lookup(codes)` is `quantized`
again, in param_dtype, unless a lattice trains with noise. The gradient of `quantized` passes to
`latents` by the straight-through estimator. `losses` are scalars: add "quantizer_loss" to the loss
that you minimise, the others are its parts.
`quantized` has the dtype of `latents`, but all arithmetic is in float32 at least: lattice codes
reach 1e7.
"""

import abc
import math
from collections.abc import Mapping
from typing import Annotated, Any

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

Losses = dict[str, Float[Array, ""]]


class Quantizer(nnx.Module):
    """A map of latent vectors to a discrete set, learned with the network around it."""

    latent_dim: int
    code_shape: tuple[int, ...]
    """The shape of one latent vector's code: () for an index, (n,) for n integers."""
    levels: tuple[int, ...] | None = None
    """How many values each integer of a code takes, from 0 on; None if any int32 is possible."""
    param_dtype: DTypeLike

    default_latent_dim = 64
    """The latent_dim of a config that names none, if the options do not determine it."""
    loss_warmup: float = 0.0
    """The share of a training over which the weight of `quantizer_loss` rises from 0 to 1."""
    learns_without_gradients = False
    """Whether it learns from `update_statistics` instead of gradients; see the recipe `paper`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Constructors check the options that are annotated with a range."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked(cls.__init__))  # noqa: B010

    @classmethod
    def fixed_latent_dim(cls, options: Mapping[str, Any]) -> int | None:
        """The latent_dim that the constructor's options determine; None if it takes any."""
        del options
        return None

    @classmethod
    def latent_dim_unit(cls, options: Mapping[str, Any]) -> int:
        """What latent_dim has to be a multiple of, for the constructor's options."""
        del options
        return 1

    @property
    def code_width(self) -> int:
        """How many integers make up the code of one latent vector."""
        return math.prod(self.code_shape)

    @property
    def num_codes(self) -> int | None:
        """How many different codes there are; None if there is no limit, as for lattices."""
        return None if self.levels is None else math.prod(self.levels)

    @abc.abstractmethod
    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        """The quantized latents and their codes; differentiable in the quantizer's parameters."""

    @abc.abstractmethod
    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        """The quantized latents of given codes."""

    def losses(
        self,
        latents: Float[Array, "... latent_dim"],
        quantized: Float[Array, "... latent_dim"],
        where: Bool[Array, "..."] | None,
    ) -> Losses:
        """The quantizer's loss and its parts.

        Args:
          latents: as `prepare` returns them.
          quantized: what `quantize` makes of them.
          where: the latents that count, in a shape that broadcasts; None if all do.
        """
        raise NotImplementedError

    def prepare(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        """Transforms the latents before they are quantized, differentiably."""
        return latents

    def initialise(
        self,
        latents: Float[Array, "... latent_dim"],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        """Sees each training batch before it is quantized, for an initialisation from the first."""
        del latents, mask, key

    def update_statistics(
        self,
        latents: Float[Array, "... latent_dim"],
        codes: Int[Array, "..."],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        """Learns from a training batch by other means than gradients, if the quantizer does."""
        del latents, codes, mask, key

    def forward(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool,
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "batch ... latent_dim"], Int[Array, "batch ..."], Losses]:
        """As `__call__`, for prepared latents in param_dtype and without the gradient to them."""
        if train:
            self.initialise(jax.lax.stop_gradient(latents), mask, key)
        quantized, codes = self.quantize(latents)
        where = None if mask is None else by_example(mask, latents)
        losses = self.losses(latents, quantized, where)
        if train:
            self.update_statistics(jax.lax.stop_gradient(latents), codes, mask, key)
        return quantized, codes, losses

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        """The quantized latents, with a gradient with respect to the latents."""
        return straight_through(quantized, latents)

    def __call__(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch ... latent_dim"], Int[Array, "batch ..."], Losses]:
        """Quantizes latents.

        Args:
          latents: [batch, ..., latent_dim].
          train: whether to update what is learned without gradients. An initialisation from the
            first batch takes effect in this call, every other update in the next one.
          mask: [batch], the examples that count in losses and statistics; all by default.
          key: for what is random in training. Only some options need one.

        Returns:
          (quantized, codes, losses).

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
        quantized, codes, losses = self.forward(latents, train=train, mask=mask, key=key)
        return self.pass_gradient(quantized, latents).astype(dtype), codes, losses

    def code_length(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "..."] | None:
        """The bits of quantized latents under a density that the quantizer learns, if it does."""
        del points
        return None

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        """Arrays whose distribution is worth watching, by name, given the codes of some images."""
        return {"codes": codes}

    def codes_to_indices(self, codes: Int[Array, "..."]) -> Int[Array, "..."]:
        """One index from 0 to num_codes − 1 per latent vector; the first integer varies fastest.

        The −1 of a stage that `ResidualVQ` dropped in training has no index.

        Raises:
          ValueError: if the quantizer has 2³¹ codes or more.
        """
        if not self.code_shape:
            return codes
        return jnp.sum(codes * self._place_values(), axis=-1, dtype=jnp.int32)

    def indices_to_codes(self, indices: Int[Array, "..."]) -> Int[Array, "..."]:
        """The codes of indices; the inverse of `codes_to_indices`.

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
    """A mask of examples in a shape that broadcasts with an array [batch, ...]."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def both(
    mask: Bool[Array, "batch"] | None, other: Bool[Array, "batch"] | None
) -> Bool[Array, "batch"] | None:
    """The examples in two masks; None stands for all."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def straight_through(
    quantized: Float[Array, "..."], latents: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`quantized`, with the gradient of `latents`."""
    return jax.lax.stop_gradient(quantized) + (latents - jax.lax.stop_gradient(latents))


def mean(values: Float[Array, "..."], where: Bool[Array, "..."] | None) -> Float[Array, ""]:
    """The mean of the values that count; 0 if none does."""
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
    """(codebook loss, commitment loss): the same value, a mean of squares over all elements.

    The first one's gradient moves the quantizer towards the latents, the second one's the latents
    towards the quantizer (van den Oord et al. 2017, eq. 3).
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
) -> Losses:
    """VQ-VAE's loss: codebook loss + commitment cost × commitment loss."""
    codebook_loss, commitment_loss = distances(latents, quantized, where)
    return {
        "quantizer_loss": codebook_loss + commitment_cost * commitment_loss,
        "codebook_loss": codebook_loss,
        "commitment_loss": commitment_loss,
    }
