"""Searches codebooks, and adds values up by code, in blocks of the codebook."""

import functools
import math
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

_PRECISION = jax.lax.Precision.HIGHEST

# A larger codebook is searched in blocks of at most this many vectors, so that the matrix of all
# latents by all vectors is never in memory.
_BLOCK_SIZE = 256


def _blocks(codebook_size: int) -> tuple[int, int]:
    """Returns (number of blocks, vectors per block) of a codebook, at most _BLOCK_SIZE each."""
    num_blocks = -(-codebook_size // _BLOCK_SIZE)
    return num_blocks, -(-codebook_size // num_blocks)


def nearest(
    latents: Float[Array, "... latent_dim"], codebook: Float[Array, "codes latent_dim"]
) -> Int[Array, "..."]:
    """Finds the index of the codebook vector nearest to each latent, the lowest one on ties.

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
    """Finds the argmin, in half of the time that `jnp.argmin` takes on a CPU."""
    is_larger = values > jnp.min(values, axis=-1, keepdims=True)
    numbers = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_larger, len(numbers), numbers), axis=-1)


def sums_by_code(
    codes: Int[Array, "batch ..."],
    values: Float[Array, "batch ... width"],
    codebook_size: int,
    num_shares: int = 1,
) -> Float[Array, "codes width"]:
    """Adds up, for each index of the codebook, the values that have it as their code.

    The values are added in the same order every time.

    Args:
      codes: [batch, ...], int32.
      values: [batch, ..., width].
      codebook_size: how many codes there are.
      num_shares: into how many equal parts the devices split the batch. Each part is summed by
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
    """Adds up each share value by value; on a GPU the order would be random."""
    zeros = jnp.zeros((codebook_size, values.shape[-1]), values.dtype)
    return jax.vmap(lambda codes, values: zeros.at[codes].add(values))(codes, values)


def _multiply(
    codebook_size: int, codes: Int[Array, "shares n"], values: Float[Array, "shares n width"]
) -> Float[Array, "shares codes width"]:
    """Adds up each share by a product with one-hot vectors; on a CPU this is many times slower."""
    num_blocks, block_size = _blocks(codebook_size)

    def of_block(first: Int[Array, ""]) -> Float[Array, "shares block width"]:
        one_hot = jax.nn.one_hot(codes - first, block_size, dtype=values.dtype)
        return jnp.einsum("snk,snd->skd", one_hot, values, precision=_PRECISION)

    sums = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(num_blocks) * block_size), 0, 1)
    return sums.reshape(len(codes), num_blocks * block_size, -1)[:, :codebook_size]
