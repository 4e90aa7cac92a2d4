"""The common part of quantizers with a codebook: the search for the nearest vector, options."""

import abc
import functools
import math
from typing import Annotated, Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llvq.fields import Choice, Number
from llvq.quantizers.base import (
    Losses,
    Quantizer,
    by_example,
    codebook_losses,
    straight_through,
)

_PRECISION = jax.lax.Precision.HIGHEST

# Options of these quantizers. The defaults are those of van den Oord et al. 2017.
Distance = Annotated[str, Choice("euclidean", "cosine")]
Gradient = Annotated[str, Choice("straight_through", "rotation")]
Initialisation = Annotated[str, Choice("random", "batch")]
RestartThreshold = Annotated[float, Number(0, 1)]

_SMALLEST_LENGTH = 1e-12  # of a vector that is normalised; shorter ones stay near 0
_KMEANS_ITERATIONS = 10

# A larger codebook is searched in blocks of at most this many vectors, so that the matrix of all
# latents by all vectors is never in memory.
_BLOCK_SIZE = 256


def _blocks(codebook_size: int) -> tuple[int, int]:
    """How many blocks of at most _BLOCK_SIZE vectors make up a codebook, and how many each has."""
    num_blocks = -(-codebook_size // _BLOCK_SIZE)
    return num_blocks, -(-codebook_size // num_blocks)


def nearest(
    latents: Float[Array, "... latent_dim"], codebook: Float[Array, "codes latent_dim"]
) -> Int[Array, "..."]:
    """The index of the codebook vector nearest to each latent, the lowest one on ties.

    The distance is ‖z‖² + ‖e‖² − 2z·e, with all three terms: ‖z‖² is the same for every e, but its
    rounding decides between the many near-zero vectors of a codebook that EMA has let die.
    """
    latents, codebook = jax.lax.stop_gradient((latents, codebook))
    latent_norms = jnp.sum(latents**2, axis=-1, keepdims=True)
    norms = jnp.sum(codebook**2, axis=-1)
    num_blocks, block_size = _blocks(len(codebook))
    missing = num_blocks * block_size - len(codebook)
    # The vectors that fill up the last block are infinitely far away.
    codebook = jnp.pad(codebook, ((0, missing), (0, 0)))
    norms = jnp.pad(norms, (0, missing), constant_values=jnp.inf)

    def search(best: tuple[Array, Array], block: tuple[Array, Array, Array]) -> Any:
        first, vectors, norms = block
        products = jnp.einsum("...d,kd->...k", latents, vectors, precision=_PRECISION)
        distances = latent_norms + norms - 2.0 * products
        distance = jnp.min(distances, axis=-1)
        code = first + jax.lax.platform_dependent(
            distances,
            cpu=_argmin_by_comparison,
            default=lambda values: jnp.argmin(values, axis=-1).astype(jnp.int32),
        )
        is_nearer = distance < best[0]
        return jax.tree.map(functools.partial(jnp.where, is_nearer), (distance, code), best), None

    blocks = (
        jnp.arange(num_blocks, dtype=jnp.int32) * block_size,
        codebook.reshape(num_blocks, block_size, -1),
        norms.reshape(num_blocks, block_size),
    )
    nowhere = jnp.full_like(latent_norms[..., 0], jnp.inf)
    (_, codes), _ = jax.lax.scan(search, (nowhere, jnp.zeros_like(nowhere, jnp.int32)), blocks)
    return codes


def _argmin_by_comparison(values: Float[Array, "... n"]) -> Int[Array, "..."]:
    """The argmin, in half of the time that `jnp.argmin` takes a CPU."""
    is_larger = values > jnp.min(values, axis=-1, keepdims=True)
    numbers = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_larger, len(numbers), numbers), axis=-1)


def sums_by_code(
    codes: Int[Array, "batch ..."],
    values: Float[Array, "batch ... width"],
    codebook_size: int,
    num_shares: int = 1,
) -> Float[Array, "codes width"]:
    """The sum, for each index of the codebook, of the values whose code it is.

    The values are added in the same order every time.

    Args:
      codes: [batch, ...], int32.
      values: [batch, ..., width].
      codebook_size: how many codes there are.
      num_shares: into how many equal parts several devices split the batch. Each part is summed by
        itself first; communication is then needed only once.
    """
    shares = math.gcd(num_shares, len(codes))
    codes = codes.reshape(shares, codes.size // shares)
    values = values.reshape(shares, codes.shape[1], values.shape[-1])
    add, multiply = (functools.partial(f, codebook_size) for f in (_add, _multiply))
    return jax.lax.platform_dependent(codes, values, cpu=add, default=multiply).sum(0)


def _add(
    codebook_size: int, codes: Int[Array, "shares n"], values: Float[Array, "shares n width"]
) -> Float[Array, "shares codes width"]:
    """Adds up each share, one value after the other; on a GPU the order would be random."""
    zeros = jnp.zeros((codebook_size, values.shape[-1]), values.dtype)
    return jax.vmap(lambda codes, values: zeros.at[codes].add(values))(codes, values)


def _multiply(
    codebook_size: int, codes: Int[Array, "shares n"], values: Float[Array, "shares n width"]
) -> Float[Array, "shares codes width"]:
    """Adds up each share by a product with one-hot vectors; a CPU takes many times as long."""
    num_blocks, block_size = _blocks(codebook_size)

    def of_block(first: Int[Array, ""]) -> Float[Array, "shares block width"]:
        one_hot = jax.nn.one_hot(codes - first, block_size, dtype=values.dtype)
        return jnp.einsum("snk,snd->skd", one_hot, values, precision=_PRECISION)

    sums = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(num_blocks) * block_size), 0, 1)
    return sums.reshape(len(codes), num_blocks * block_size, -1)[:, :codebook_size]


def normalise(vectors: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Vectors of length 1; 0 stays 0."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_LENGTH**2))


def rotate(
    quantized: Float[Array, "... width"], latents: Float[Array, "... width"]
) -> Float[Array, "... width"]:
    """`quantized`, with the gradient of the rotation trick (Fifty et al. 2024, arXiv 2410.06424).

    The gradient is that of λ·R·latents. R rotates each latent to the direction of its quantized
    vector, and λ is the ratio of their lengths; both are held constant.
    """
    latents_held, quantized = jax.lax.stop_gradient((latents, quantized))
    start, end = normalise(latents_held), normalise(quantized)
    bisector = normalise(start + end)
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
    """Some of a batch's latents, drawn uniformly.

    Args:
      latents: [batch, ..., width].
      mask: [batch], the examples to draw from; all by default.
      key: decides which.
      count: how many are drawn.
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
    """(sums, counts) of the latents of each code; see `sums_by_code`."""
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
        """The vectors that latents are replaced by."""

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
    ) -> Losses:
        return codebook_losses(latents, quantized, where, self.commitment_cost)

    def histograms(self, codes: Int[Array, "..."]) -> dict[str, Array]:
        return {"codebook_usage": codes}


class LearnedCodebook(CodebookQuantizer):
    """A codebook of vectors that are learnt one by one: the base class of VQ and VQ-EMA.

    Attributes:
      distance: "euclidean" or "cosine"; with the latter, latents and codebook vectors are
        normalised before anything else (Yu et al. 2022, arXiv 2110.04627).
      gradient: "straight_through" or "rotation"; see `rotate`.
      initialisation: "random", or "batch" for k-means on the first training batch
        (Zeghidour et al. 2021, arXiv 2107.03312).
      restart_threshold: the number of latents per vector is tracked as a moving average. A vector
        whose average falls below this fraction of the codebook's mean is dead. After a training
        step, a latent drawn from the batch replaces it, and its average becomes the mean. 0: no
        restarts.
    """

    codebook: nnx.Variable[Array]  # [codebook_size, latent_dim]
    cluster_size: nnx.BatchStat[Array] | None  # [codebook_size], the moving averages, if needed

    def _set_up(
        self,
        latent_dim: int,
        codebook_size: int,
        *,
        commitment_cost: float,
        distance: str,
        gradient: str,
        initialisation: str,
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
        self.num_shares = 1
        self.is_initialised = (
            nnx.BatchStat(jnp.zeros((), param_dtype)) if initialisation == "batch" else None
        )

    def points(self) -> Float[Array, "codes latent_dim"]:
        codebook = self.codebook[...]
        return normalise(codebook) if self.distance == "cosine" else codebook

    def prepare(self, latents: Float[Array, "... latent_dim"]) -> Float[Array, "... latent_dim"]:
        return normalise(latents) if self.distance == "cosine" else latents

    def pass_gradient(
        self,
        quantized: Float[Array, "... latent_dim"],
        latents: Float[Array, "... latent_dim"],
    ) -> Float[Array, "... latent_dim"]:
        return (rotate if self.gradient == "rotation" else straight_through)(quantized, latents)

    def initialise(
        self,
        latents: Float[Array, "batch ... latent_dim"],
        mask: Bool[Array, "batch"] | None,
        key: Key[Array, ""] | None,
    ) -> None:
        if self.is_initialised is None:
            return
        if key is None:
            raise ValueError("initialisation='batch' needs a key in training")
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
