"""Counting codes, against mmh3's MurmurHash3 and a plain Counter."""

import collections
import math

import jax
import mmh3
import numpy as np
import pytest

from llvq.codebook_usage import CodebookUsage, fingerprints


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 63, 64])
def test_fingerprints_are_murmur3(width):
    rng = np.random.default_rng(width)
    codes = rng.integers(-(2**31), 2**31, (50, width)).astype(np.int32)
    codes[:10] = rng.integers(-3, 3, (10, width))
    filled_up = np.pad(codes, ((0, 0), (0, -width % 4)))
    for row, actual in zip(filled_up, np.asarray(jax.jit(fingerprints)(codes)), strict=True):
        assert actual.tobytes() == mmh3.hash_bytes(row.tobytes(), seed=0, x64arch=False)


def test_neighbouring_codes_do_not_collide():
    """All 3^10 codes of -1, 0, 1: the hash must tell the smallest differences apart."""
    grid = np.stack(np.meshgrid(*[[-1, 0, 1]] * 10), -1).reshape(-1, 10).astype(np.int32)
    assert len(np.unique(np.asarray(fingerprints(grid)), axis=0)) == 3**10


def count(codes, batch_size):
    usage = CodebookUsage()
    for start in range(0, len(codes), batch_size):
        usage.add(np.asarray(fingerprints(codes[start : start + batch_size])))
    return usage


@pytest.mark.parametrize("distinct", [1, 7, 3000])
@pytest.mark.parametrize("batch_size", [1000, 9999])
def test_against_a_counter(distinct, batch_size):
    rng = np.random.default_rng(0)
    codes = rng.integers(-(2**30), 2**30, (distinct, 8)).astype(np.int32)
    drawn = codes[
        np.minimum(rng.geometric(20 / distinct if distinct > 20 else 0.5, 9999), distinct) - 1
    ]
    usage = count(drawn, batch_size)
    counter = collections.Counter(map(bytes, drawn))
    assert usage.num_vectors == 9999
    assert usage.num_distinct == len(counter)
    frequencies = [n / 9999 for n in counter.values()]
    perplexity = math.exp(-sum(p * math.log(p + 1e-10) for p in frequencies))
    # The usual formula's 1e-10 guards log 0; no code counted here has frequency 0.
    assert usage.perplexity == pytest.approx(perplexity, rel=1e-5)


def test_more_codes_than_wait_unmerged():
    """Beyond the size at which batches are merged: every second code comes twice."""
    codes = np.arange(3_000_000, dtype=np.int32) // 3 * 2 + np.arange(3_000_000) % 3 % 2
    usage = CodebookUsage()
    for batch in np.array_split(codes[:, None].astype(np.int32), 7):
        usage.add(np.asarray(fingerprints(batch)))
    assert usage.num_vectors == 3_000_000
    assert usage.num_distinct == 2_000_000


def test_even_and_single_codes_have_the_perplexity_of_their_number():
    assert count(np.zeros((100, 4), np.int32), 10).perplexity == pytest.approx(1)
    assert count(np.arange(64, dtype=np.int32)[:, None], 16).perplexity == pytest.approx(64)
