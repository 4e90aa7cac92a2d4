"""FSQ: each coordinate is bounded and rounded (Mentzer et al. 2023, arXiv 2309.15505)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llvq.fields import Integer, Several
from llvq.quantizers.base import Quantizer

# The bound stays short of the outermost levels by this share of half the range, as in the paper.
_MARGIN = 1e-3
_MOST_LEVELS = 1000  # with more, the margin would be wider than half a level


class FSQ(Quantizer):
    """Finite scalar quantization: a fixed grid of `levels[i]` values for entry i of a latent.

    A latent has as many entries as there are levels. Codes are digits, from 0 to levels[i] − 1:
    int32 [batch, ..., len(levels)]. Nothing is learned, and there is no loss.
    """

    def __init__(
        self,
        levels: Annotated[Sequence[int], Several(Integer(2, _MOST_LEVELS))] = (8, 5, 5, 5),
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs  # nothing is drawn
        self.levels = tuple(levels)
        self.latent_dim = len(self.levels)
        self.code_shape = (self.latent_dim,)
        self.param_dtype = param_dtype

    @classmethod
    def fixed_latent_dim(cls, options: Mapping[str, Any]) -> int:
        return len(options["levels"])

    def _half_widths(self) -> Float[np.ndarray, "latent_dim"]:
        """Returns the number of levels below 0, for each entry."""
        return (np.array(self.levels) // 2).astype(self.param_dtype)

    def prepare(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        """Bounds the latents by tanh, scaled so that the lowest level is near −1 (paper, sec. A.1).

        An even number of levels is half a level off centre; the shift keeps 0 near 0.
        """
        levels = np.array(self.levels)
        half_range = (levels - 1) * (1 - _MARGIN) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
        shift, half_range, offset = (
            np.asarray(x, self.param_dtype)
            for x in (np.tan(offset / half_range), half_range, offset)
        )
        return (jnp.tanh(latents + shift) * half_range - offset) / self._half_widths()

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "... latent_dim"]]:
        half_widths = self._half_widths()
        codes = jnp.round(jax.lax.stop_gradient(latents) * half_widths) + half_widths
        # NaN converts to an arbitrary integer; the clip keeps it in range.
        codes = jnp.clip(codes.astype(jnp.int32), 0, np.array(self.levels, np.int32) - 1)
        return self.lookup(codes), codes

    def lookup(self, codes: Int[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        half_widths = self._half_widths()
        return (codes.astype(self.param_dtype) - half_widths) / half_widths
