"""One network for several rates: a lattice for each of them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Number, Several
from llvq.quantizers.base import Metrics, Quantizer, QuantizerOutput, both, by_example
from llvq.quantizers.rate_lattice import (
    INITIAL_STEP,
    TRAINING,
    WARMUP,
    InitialStep,
    Training,
    Warmup,
)
from llvq.quantizers.scaled_lattice import (
    D4Lattice,
    DiagonalLattice,
    E8Lattice,
    LeechLattice,
    ScaledLattice,
)

_LATTICES: dict[str, type[ScaledLattice]] = {
    "diagonal_lattice": DiagonalLattice,
    "d4_lattice": D4Lattice,
    "e8_lattice": E8Lattice,
    "leech_lattice": LeechLattice,
}


class MultirateLattice(Quantizer):
    """Lattices of one kind, each with a rate weight, steps and a density of its own.

    In training each example is quantized with one of them, drawn at random, so that one encoder and
    decoder learn to serve them all. The steps are what SALVQ (arXiv 2509.13482) calls gains: one
    divides the latents by them, quantizes, and multiplies by them.

    Outside training it is the first of its lattices; `llvq.at_rate` makes a model of any other.

    Attributes:
      rates: the lattices.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        lattice: Literal[
            "diagonal_lattice", "d4_lattice", "e8_lattice", "leech_lattice"
        ] = "e8_lattice",
        rate_weights: Annotated[tuple[float, ...], Several(Number(0))] = (3e-4, 3e-3),
        warmup: Warmup = WARMUP,
        initial_step: InitialStep = INITIAL_STEP,
        training: Training = TRAINING,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Makes the lattices.

        Args:
          latent_dim: of the latents, a multiple of the lattice's dimension.
          lattice: the quantizer of each rate.
          rate_weights: λ of each.
          warmup: of all of them; see `RateLattice`.
          initial_step: likewise.
          training: likewise.
          param_dtype: of the parameters.
          rngs: not needed, since nothing is drawn.
        """
        self.rates = nnx.List(
            _LATTICES[lattice](
                latent_dim,
                rate_weight=rate_weight,
                warmup=warmup,
                initial_step=initial_step,
                training=training,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for rate_weight in rate_weights
        )
        self.latent_dim = latent_dim
        self.code_shape = (latent_dim,)
        self.warmup = warmup
        self.param_dtype = param_dtype

    @classmethod
    def latent_dim_unit(cls, options: Mapping[str, Any]) -> int:
        return _LATTICES[options["lattice"]].latent_dim_unit(options)

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "... latent_dim"]]:
        return self.rates[0].quantize(latents)

    def lookup(self, codes: Int[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return self.rates[0].lookup(codes)

    def code_length(self, points: Float[Array, "... latent_dim"]) -> Float[Array, "..."]:
        """Returns the bits that each point costs at the first rate."""
        return self.rates[0].code_length(points)

    def forward(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool,
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> QuantizerOutput:
        """Quantizes, and adds the gradient to the latents, since each rate has its own.

        In training, loss and metrics are means over all examples; metrics of one rate have its
        number in their name: rate_0, distortion_0, ….
        """
        if not train:
            first = self.rates[0]
            output = first.forward(latents, train=False, mask=mask, key=None)
            return output._replace(quantized=first.pass_gradient(output.quantized, latents))
        if key is None:
            raise ValueError("several rates need a key in training")
        of_rates, key = jax.random.split(key)
        chosen = jax.random.randint(of_rates, (len(latents),), 0, len(self.rates))
        quantized, codes = jnp.zeros_like(latents), jnp.zeros(latents.shape, jnp.int32)
        loss = jnp.zeros((), self.param_dtype)
        metrics: Metrics = {}
        count = jnp.maximum(len(latents) if mask is None else jnp.sum(mask), 1)
        for index, lattice in enumerate(self.rates):
            own = chosen == index
            points, integers, loss_of_rate, parts = lattice.forward(
                latents, train=True, mask=both(mask, own), key=key
            )
            points = lattice.pass_gradient(points, latents)
            quantized = jnp.where(by_example(own, latents), points, quantized)
            codes = jnp.where(by_example(own, latents), integers, codes)
            share = jnp.sum(own if mask is None else own & mask) / count
            loss += share * loss_of_rate
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0) + share * value
            metrics[f"rate_{index}"] = parts["rate"]
            metrics[f"distortion_{index}"] = parts["distortion"]
        return QuantizerOutput(quantized, codes, loss, metrics)

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        """Returns `quantized`, to which `forward` has added the gradient."""
        del latents
        return quantized

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        return self.rates[0].histograms(codes)
