"""Base classes of quantizers with a codebook: options, initialization, restarts."""

import abc
import functools
from typing import Annotated, Literal

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Number
from llvq.quantizers.base import (
    Metrics,
    Quantizer,
    Statistic,
    by_example,
    codebook_losses,
    straight_through,
)
from llvq.quantizers.codebook_search import nearest, sums_by_code

# Options of these quantizers. The defaults are those of van den Oord et al. 2017.
Distance = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation"]
Initialization = Literal["random", "batch"]
RestartThreshold = Annotated[float, Number(0, 1)]

_SMALLEST_LENGTH = 1e-12  # of a vector that is normalized; shorter ones stay near 0
_KMEANS_ITERATIONS = 10


def normalize(vectors: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Scales vectors to length 1; 0 stays 0."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_LENGTH**2))


def rotate(
    quantized: Float[Array, "... width"], latents: Float[Array, "... width"]
) -> Float[Array, "... width"]:
    """Gives `quantized` the gradient of the rotation trick (Fifty et al. 2024, arXiv 2410.06424).

    The gradient is that of λ·R·latents. R rotates each latent to the direction of its quantized
    vector, and λ is the ratio of their lengths; both are held constant.
    """
    latents_held, quantized = jax.lax.stop_gradient((latents, quantized))
    start, end = normalize(latents_held), normalize(quantized)
    bisector = normalize(start + end)
    along = functools.partial(jnp.sum, axis=-1, keepdims=True)
    lengths = [jnp.sqrt(along(x**2)) for x in (quantized, latents_held)]
    ratio = lengths[0] / jnp.maximum(lengths[1], _SMALLEST_LENGTH)
    rotated = latents - 2 * bisector * along(bisector * latents) + 2 * end * along(start * latents)
    return straight_through(quantized, ratio * rotated)


def draw(
    latents: Float[Array, "batch ... width"],
    mask: Bool[Array, "batch"] | None,
    key: Key[Array, ""],
    count: int,
    *,
    distinct: bool,
) -> Float[Array, "count width"]:
    """Draws latents of a batch uniformly.

    Args:
      latents: [batch, ..., width].
      mask: [batch], the examples to draw from; all if None.
      key: the random key.
      count: how many to draw.
      distinct: whether to draw without replacement, which needs a sort of all latents. If `count`
        exceeds their number, latents repeat.
    """
    num_examples = len(latents)
    vectors = latents.reshape(-1, latents.shape[-1])
    per_example = len(vectors) // num_examples
    if mask is None:
        mask = jnp.ones(num_examples, bool)
    if distinct:
        counts = jnp.repeat(mask, per_example)
        order = jnp.argsort(jnp.where(counts, jax.random.uniform(key, (len(vectors),)), jnp.inf))
        return vectors[order[jnp.arange(count) % jnp.maximum(jnp.sum(counts), 1)]]
    examples = jnp.argsort(~mask, stable=True)  # those to draw from come first
    places = jax.random.randint(key, (count,), 0, jnp.maximum(jnp.sum(mask) * per_example, 1))
    return vectors[examples[places // per_example] * per_example + places % per_example]


def sums_and_counts(
    latents: Float[Array, "batch ... width"],
    codes: Int[Array, "batch ..."],
    mask: Bool[Array, "batch"] | None,
    codebook_size: int,
    num_shares: int = 1,
) -> tuple[Float[Array, "codes width"], Float[Array, "codes"]]:
    """Returns (sums, counts) of the latents of each code; see `sums_by_code`."""
    # The last column counts the latents.
    ones = jnp.ones((*latents.shape[:-1], 1), latents.dtype)
    values = jnp.append(latents, ones, axis=-1)
    if mask is not None:
        values *= by_example(mask, values)
    sums = sums_by_code(codes, values, codebook_size, num_shares)
    return sums[:, :-1], sums[:, -1]


class CodebookQuantizer(Quantizer):
    """Replaces each latent by its nearest codebook vector.

    Codes are indices into the codebook, one for each latent vector: int32 [batch, ...].
    """

    code_shape = ()

    commitment_cost: float

    @abc.abstractmethod
    def points(self) -> Float[Array, "codes latent_dim"]:
        """Returns the codebook vectors."""

    def quantize(
        self, latents: Float[Array, "... latent_dim"]
    ) -> tuple[Float[Array, "... latent_dim"], Int[Array, "..."]]:
        points = self.points()
        codes = nearest(latents, points)
        return jnp.take(points, codes, axis=0), codes

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... latent_dim"]:
        return jnp.take(self.points(), codes, axis=0)

    def losses(
        self,
        latents: Float[Array, "... latent_dim"],
        quantized: Float[Array, "... latent_dim"],
        where: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        return codebook_losses(latents, quantized, where, self.commitment_cost)

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        return {"codebook_usage": codes}


class LearnedCodebook(CodebookQuantizer):
    """A codebook of vectors that are learned one by one: the base class of VQ and VQ-EMA.

    Attributes:
      distance: "euclidean" or "cosine"; with the latter, latents and codebook vectors are
        normalized before anything else (Yu et al. 2022, arXiv 2110.04627).
      gradient: "straight_through" or "rotation"; see `rotate`.
      initialization: "random", or "batch" for k-means on the first training batch
        (Zeghidour et al. 2021, arXiv 2107.03312).
      restart_threshold: the number of latents per vector is tracked as a moving average. A vector
        whose average falls below this fraction of the codebook's mean is dead. After a training
        step, a latent drawn from the batch replaces it, and its average becomes the mean. 0: no
        restarts.
    """

    codebook: nnx.Variable[Array]  # [codebook_size, latent_dim]
    cluster_size: Statistic | None  # [codebook_size], the moving averages, if needed

    def _set_up(
        self,
        latent_dim: int,
        codebook_size: int,
        *,
        commitment_cost: float,
        distance: str,
        gradient: str,
        initialization: str,
        restart_threshold: float,
        param_dtype: DTypeLike,
    ) -> None:
        self.latent_dim = latent_dim
        self.levels = (codebook_size,)
        self.commitment_cost = commitment_cost
        self.distance = distance
        self.gradient = gradient
        self.restart_threshold = restart_threshold
        self.param_dtype = param_dtype
        # Saved checkpoints have this name.
        self.is_initialised = (
            Statistic(jnp.zeros((), param_dtype)) if initialization == "batch" else None
        )

    def points(self) -> Float[Array, "codes latent_dim"]:
        codebook = self.codebook[...]
        return normalize(codebook) if self.distance == "cosine" else codebook

    def prepare(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return normalize(latents) if self.distance == "cosine" else latents

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        return (rotate if self.gradient == "rotation" else straight_through)(quantized, latents)

    def initialize(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        if self.is_initialised is None:
            return
        if key is None:
            raise ValueError("initialization='batch' needs a key in training")
        codebook_size = len(self.codebook[...])
        is_first = self.is_initialised[...] == 0
        mean_count = jnp.asarray(latents.size / latents.shape[-1] / codebook_size, latents.dtype)
        if mask is not None:
            is_first &= jnp.any(mask)  # an empty batch does not count as the first
            mean_count *= jnp.mean(mask, dtype=latents.dtype)

        def step(_: int, centres: Array) -> Array:
            codes = nearest(latents, centres)
            sums, counts = sums_and_counts(latents, codes, mask, codebook_size, self.num_shares)
            means = sums / jnp.maximum(counts, 1)[:, None]
            return jnp.where(counts[:, None] > 0, means, centres)

        def cluster() -> Array:
            start = draw(latents, mask, key, codebook_size, distinct=True)
            return jax.lax.fori_loop(0, _KMEANS_ITERATIONS, step, start)

        centres = jax.lax.cond(is_first, cluster, lambda: self.codebook[...])
        self._replace(jnp.broadcast_to(is_first, codebook_size), centres, mean_count)
        self.is_initialised[...] = jnp.where(is_first, 1, self.is_initialised[...])

    def _replace(
        self,
        is_new: Bool[Array, "codes"],
        vectors: Float[Array, "codes latent_dim"],
        count: Float[Array, ""],
    ) -> None:
        """Replaces the codebook vectors marked in `is_new`; their moving average becomes count."""
        codebook = self.codebook[...]
        replaced = jnp.where(is_new[:, None], vectors, codebook)
        # Gradients still reach the codebook.
        self.codebook[...] = straight_through(replaced, codebook)
        if self.cluster_size is not None:
            self.cluster_size[...] = jnp.where(is_new, count, self.cluster_size[...])

    def _restart(
        self,
        cluster_size: Float[Array, "codes"],
        latents: Float[Array, "batch ... latent_dim"],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        """Replaces dead vectors by latents drawn from the batch."""
        if key is None:
            raise ValueError("restart_threshold above 0 needs a key in training")
        mean = jnp.mean(cluster_size)
        is_dead = cluster_size < self.restart_threshold * mean
        if mask is not None:
            is_dead &= jnp.any(mask)
        self._replace(is_dead, draw(latents, mask, key, len(cluster_size), distinct=False), mean)
