"""Residual VQ: each codebook quantizes what those before it left (arXiv 2107.03312)."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Choice, Flag, Integer, Number
from llvq.quantizers.base import (
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Losses,
    Quantizer,
    both,
    by_example,
)
from llvq.quantizers.codebook import CodebookQuantizer, Initialisation, RestartThreshold
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VectorQuantizer
from llvq.quantizers.vq_ema import EMAVectorQuantizer

_STAGES: dict[str, Callable[..., CodebookQuantizer]] = {
    "vq": VectorQuantizer,
    "vq_ema": EMAVectorQuantizer,
    "simvq": SimVQ,
}


class ResidualVQ(Quantizer):
    """A sum of `depth` codebook vectors, chosen one after the other (Zeghidour et al. 2021).

    Codes are one index per stage: int32 [batch, ..., depth]. `lookup` also accepts the indices of
    only the first stages, and gives a coarser approximation.

    Attributes:
      dropout: whether each training example uses a random number of stages, from 1 to `depth`, so
        that one model serves all rates. The codes of the stages left out are then −1.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        depth: Annotated[int, Integer(1, 64)] = 4,
        codebook_size: CodebookSize = 1024,
        stage: Annotated[str, Choice(*_STAGES)] = "vq_ema",
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        decay: Annotated[float, Number(0, 1, excluded=1)] = 0.99,
        initialisation: Initialisation = "batch",
        restart_threshold: RestartThreshold = 0.1,
        dropout: Annotated[bool, Flag()] = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Args:
        latent_dim: of the latents.
        depth: how many stages there are.
        codebook_size: of each stage.
        stage: the quantizer of each stage: vq, vq_ema or simvq.
        commitment_cost: of each stage.
        decay: of the moving averages of vq_ema.
        initialisation: of each codebook; see `LearnedCodebook`. simvq has none.
        restart_threshold: likewise.
        dropout: see the class.
        param_dtype: of the codebooks.
        rngs: the source of initial values.
        """
        options: dict[str, Any] = {
            "codebook_size": codebook_size,
            "commitment_cost": commitment_cost,
        }
        if stage != "simvq":
            options["initialisation"] = initialisation
            options["restart_threshold"] = restart_threshold
        if stage == "vq_ema":
            options["decay"] = decay
        self.latent_dim = latent_dim
        self.code_shape = (depth,)
        self.levels = (codebook_size,) * depth
        self.dropout = dropout
        self.param_dtype = param_dtype
        self.stages = nnx.List(
            _STAGES[stage](latent_dim, param_dtype=param_dtype, rngs=rngs, **options)
            for _ in range(depth)
        )

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "... depth"]]:
        quantized, codes, _ = self.forward(latents, train=False, mask=None, key=None)
        return quantized, codes

    def lookup(self, codes: Int[Array, "... stages"]) -> Float[Array, "... latent_dim"]:
        total = jnp.zeros((*codes.shape[:-1], self.latent_dim), self.param_dtype)
        for stage, code in zip(self.stages, jnp.moveaxis(codes, -1, 0), strict=False):
            total += jnp.where(code[..., None] >= 0, stage.lookup(code), 0)
        return total

    def forward(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        *,
        train: bool,
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "batch ... latent_dim"], Int[Array, "batch ... depth"], Losses]:
        """Quantizes stage by stage; the losses are the sums of the stages'."""
        depth, num_stages = len(self.stages), None
        if train and self.dropout:
            if key is None:
                raise ValueError("dropout=True needs a key in training")
            key, of_dropout = jax.random.split(key)
            num_stages = jax.random.randint(of_dropout, (len(latents),), 1, depth + 1)
        total, codes = jnp.zeros_like(latents), []
        losses: Losses = {}
        for index, stage in enumerate(self.stages):
            uses = None if num_stages is None else index < num_stages
            quantized, code, parts = stage.forward(
                latents - jax.lax.stop_gradient(total),
                train=train,
                mask=both(mask, uses),
                key=None if key is None else jax.random.fold_in(key, index),
            )
            if uses is not None:
                quantized = jnp.where(by_example(uses, quantized), quantized, 0)
                code = jnp.where(by_example(uses, code), code, -1)
            total += quantized
            codes.append(code)
            losses = {name: losses.get(name, 0) + value for name, value in parts.items()}
        return total, jnp.stack(codes, axis=-1), losses
