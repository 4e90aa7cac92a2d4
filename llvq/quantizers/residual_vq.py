"""Residual VQ: each codebook quantizes what those before it left (arXiv 2107.03312)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Integer, Number
from llvq.quantizers.base import (
    COMMITMENT_COST,
    CodebookSize,
    CommitmentCost,
    Metrics,
    Quantizer,
    QuantizerOutput,
    both,
    by_example,
)
from llvq.quantizers.codebook import CodebookQuantizer, Initialization, RestartThreshold
from llvq.quantizers.simvq import SimVQ
from llvq.quantizers.vq import VQ
from llvq.quantizers.vq_ema import VQEMA

_STAGES: dict[str, Callable[..., CodebookQuantizer]] = {
    "vq": VQ,
    "vq_ema": VQEMA,
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
        stage: Literal["vq", "vq_ema", "simvq"] = "vq_ema",
        commitment_cost: CommitmentCost = COMMITMENT_COST,
        decay: Annotated[float, Number(0, 1, excluded=1)] = 0.99,
        initialization: Initialization = "batch",
        restart_threshold: RestartThreshold = 0.1,
        dropout: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the stages.

        Args:
          latent_dim: of the latents.
          depth: how many stages there are.
          codebook_size: of each stage.
          stage: the quantizer of each stage: vq, vq_ema or simvq.
          commitment_cost: of each stage.
          decay: of the moving averages of vq_ema.
          initialization: of each codebook; see `LearnedCodebook`. simvq has none.
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
            options["initialization"] = initialization
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
        output = self.forward(latents, train=False, mask=None, key=None)
        return output.quantized, output.codes

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
    ) -> QuantizerOutput:
        """Quantizes stage by stage; loss and metrics are the sums of the stages'."""
        depth, num_stages = len(self.stages), None
        if train and self.dropout:
            if key is None:
                raise ValueError("dropout=True needs a key in training")
            key, of_dropout = jax.random.split(key)
            num_stages = jax.random.randint(of_dropout, (len(latents),), 1, depth + 1)
        total, codes = jnp.zeros_like(latents), []
        loss = jnp.zeros((), self.param_dtype)
        metrics: Metrics = {}
        for index, stage in enumerate(self.stages):
            uses = None if num_stages is None else index < num_stages
            quantized, code, loss_of_stage, parts = stage.forward(
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
            loss += loss_of_stage
            metrics = {name: metrics.get(name, 0) + value for name, value in parts.items()}
        return QuantizerOutput(total, jnp.stack(codes, axis=-1), loss, metrics)
