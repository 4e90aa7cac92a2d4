"""The contract that every quantizer keeps.

    quantized, codes, losses = quantizer(latents)

`latents` are [..., latent_dim]. `codes` are int32, and `quantizer.lookup(codes)` is `quantized`
again, in param_dtype. The gradient of `quantized` passes to `latents` unchanged (the
straight-through estimator). `losses` are scalars: add "quantizer_loss" to the loss that you
minimise, the others are its parts.
`quantized` has the dtype of `latents`, but all arithmetic is in float32 at least: lattice codes
reach 1e7.
"""

import abc
import math
from typing import Annotated

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llvq.fields import Integer, Number

# Options that several quantizers share, with the paper's defaults.
CodebookSize = Annotated[int, Integer(2, 2**24)]
CODEBOOK_SIZE = 512
CommitmentCost = Annotated[float, Number(0)]
COMMITMENT_COST = 0.25

Losses = dict[str, Float[Array, ""]]


class Quantizer(nnx.Module):
    """A map of latent vectors to a discrete set, learnt with the network around it."""

    latent_dim: int
    code_shape: tuple[int, ...]
    """The shape of one latent vector's code: () for an index, (n,) for n integers."""
    param_dtype: DTypeLike

    @property
    def code_width(self) -> int:
        """How many integers make up the code of one latent vector."""
        return math.prod(self.code_shape)

    @abc.abstractmethod
    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        """The quantized latents and their codes; differentiable in the quantizer's parameters."""

    @abc.abstractmethod
    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        """The quantized latents of given codes."""

    @abc.abstractmethod
    def losses(self, codebook_loss: Float[Array, ""], commitment_loss: Float[Array, ""]) -> Losses:
        """The quantizer's loss and its parts, from the two distances (see `__call__`)."""

    def update_statistics(
        self,
        latents: Float[Array, "... latent_dim"],
        codes: Int[Array, "..."],
        mask: Bool[Array, "..."] | None,
    ) -> None:
        """Learns from a training batch by other means than gradients, if the quantizer does."""
        del latents, codes, mask

    def __call__(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool = False,
        mask: Bool[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch ... latent_dim"], Int[Array, "batch ..."], Losses]:
        """Quantizes latents.

        Args:
          latents: [batch, ..., latent_dim].
          train: whether to update, after this call, what is learnt without gradients.
          mask: [batch], the examples that count in losses and statistics; all by default.

        Returns:
          (quantized, codes, losses). Both distances in the losses are means of squares over all
          elements that count: codebook_loss moves the quantizer towards the latents,
          commitment_loss the latents towards the quantizer (van den Oord et al. 2017, eq. 3).

        Raises:
          ValueError: if the last axis of `latents` is not latent_dim long.
        """
        if latents.shape[-1] != self.latent_dim:
            raise ValueError(
                f"latents {latents.shape} must end in latent_dim={self.latent_dim}: "
                f"{type(self).__name__} quantizes the last axis"
            )
        dtype = latents.dtype
        latents = latents.astype(self.param_dtype)
        quantized, codes = self.quantize(latents)
        where = None if mask is None else mask.reshape(-1, *[1] * (latents.ndim - 1))
        losses = self.losses(
            jnp.mean((quantized - jax.lax.stop_gradient(latents)) ** 2, where=where),
            jnp.mean((latents - jax.lax.stop_gradient(quantized)) ** 2, where=where),
        )
        if train:
            self.update_statistics(jax.lax.stop_gradient(latents), codes, mask)
        straight_through = jax.lax.stop_gradient(quantized) + (
            latents - jax.lax.stop_gradient(latents)
        )
        return straight_through.astype(dtype), codes, losses

    @abc.abstractmethod
    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        """Arrays whose distribution is worth watching, by name, given the codes of some images."""
