"""Counting codes, against Python's integers, a plain Counter and the theory of the estimates."""

import collections
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import codebook_usage as benchmark
from llvq.runtime import sharding
from llvq.usage import table
from llvq.usage.counting import fingerprints, position_offsets
from llvq.usage.table import CodebookUsage
from tests.counting import count, count_on_host, counting_step
from tests.run_counting import stream


def fingerprint(code):
    """Of one code, in Python's integers."""

    def mix(x, shifts, factors):
        for shift, factor in zip(shifts, (*factors, 1), strict=True):
            x = (x ^ x >> shift) * factor % 2**32
        return x

    one = ((16, 15, 16), (0x7FEB352D, 0x846CA68B))
    other = ((16, 13, 16), (0x85EBCA6B, 0xC2B2AE35))
    offsets = position_offsets(len(code)).tolist()
    words = [mix((int(x) + y) % 2**32, *one) for x, y in zip(code, offsets, strict=True)]
    high = mix(sum(words) % 2**32, *other)
    low = mix((sum(mix(word, *other) for word in words) + high) % 2**32, *one)
    return high << 32 | low


@pytest.mark.parametrize("width", [1, 2, 7, 8, 63, 64])
def test_fingerprints_are_sums_of_mixed_integers(width):
    rng = np.random.default_rng(width)
    codes = rng.integers(-(2**31), 2**31, (50, width)).astype(np.int32)
    codes[:10] = rng.integers(-3, 3, (10, width))
    low, high = (x.astype(np.uint64) for x in jax.device_get(jax.jit(fingerprints)(codes)))
    assert (high << np.uint64(32) | low).tolist() == [fingerprint(code) for code in codes]


def test_neighbouring_codes_do_not_collide():
    """All 3^10 codes of -1, 0, 1: the hash must tell the smallest differences apart."""
    grid = np.stack(np.meshgrid(*[[-1, 0, 1]] * 10), -1).reshape(-1, 10).astype(np.int32)
    assert count(grid, len(grid)).num_distinct == 3**10


@pytest.mark.parametrize("num_different", [2, 3])
def test_codes_that_differ_in_a_few_places_spread_evenly(num_different):
    """What a trained lattice has many of: each of the key's 64 bits flips in half of the pairs.

    Six standard errors of a fraction of 65,536 pairs: 6 · 0.5 / 256.
    """
    rng = np.random.default_rng(num_different)
    codes = rng.integers(-2, 3, (65_536, 64)).astype(np.int32)
    others = codes.copy()
    for column in rng.choice(64, num_different, replace=False):
        others[:, column] += 1
    keys = [jax.device_get(jax.jit(fingerprints)(x)) for x in (codes, others)]
    for ours, theirs in zip(*keys, strict=True):
        flipped = np.unpackbits((ours ^ theirs).view(np.uint8).reshape(-1, 4), axis=1)
        np.testing.assert_allclose(flipped.mean(axis=0), 0.5, atol=6 * 0.5 / 256)


def entropy_of(counts):
    """In bits, from the occurrences of all codes, in Python's own arithmetic."""
    total = sum(counts)
    return -math.fsum(n / total * math.log2(n / total) for n in counts)


@pytest.mark.parametrize("distinct", [1, 3000, 9000])
@pytest.mark.parametrize(
    ("num_devices", "batch_size"), [(0, 1000), (1, 1000), (8, 1000), (1, 9999)]
)
def test_against_a_counter(distinct, num_devices, batch_size):
    """On no device: on the host."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-(2**30), 2**30, (distinct, 8)).astype(np.int32)
    drawn = codes[
        np.minimum(rng.geometric(20 / distinct if distinct > 20 else 0.5, 9999), distinct) - 1
    ]
    if num_devices:
        usage = count(drawn, batch_size, devices=jax.devices()[:num_devices])
    else:
        usage = count_on_host(drawn, batch_size)
    counter = collections.Counter(map(bytes, drawn))
    assert usage.is_exact
    assert usage.standard_error == usage.entropy_standard_error == 0
    assert usage.num_vectors == 9999
    assert usage.num_distinct == len(counter)
    # Differences of the order of float64's rounding of log2 N.
    assert usage.entropy == pytest.approx(entropy_of(counter.values()), abs=1e-12)
    assert usage.perplexity == pytest.approx(2 ** entropy_of(counter.values()), rel=1e-12)
    assert usage.num_entries_in_use == (0 if distinct == 1 else 8)


def test_more_different_codes_in_a_batch_than_its_head_holds():
    """And in the next batch few of them, and again many."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 30_000, (150_000, 1)).astype(np.int32)
    codes[50_000:100_000] %= 100
    for num_devices in (1, 2):
        usage = count(codes, 50_000, devices=jax.devices()[:num_devices])
        counter = collections.Counter(codes[:, 0].tolist())
        assert usage.num_distinct == len(counter)
        assert usage.entropy == pytest.approx(entropy_of(counter.values()), abs=1e-12)


@pytest.mark.slow
def test_more_codes_than_wait_unmerged():
    """Beyond the size at which batches are merged: every second code comes twice."""
    codes = np.arange(5_100_000, dtype=np.int32) // 3 * 2 + np.arange(5_100_000) % 3 % 2
    usage = count(codes[:, None].astype(np.int32), 1_700_000)
    assert usage.is_exact
    assert usage.num_vectors == 5_100_000
    assert usage.num_distinct == 3_400_000


def test_masked_images_count_nowhere():
    """Images of 3×3 vectors; on some devices all are masked out."""
    codes = np.arange(16 * 9 * 2, dtype=np.int32).reshape(16, 3, 3, 2)
    codes[:5, ..., 0] = 4
    mesh = sharding.make_mesh()
    for masked_in in (0, 1, 5, 16):
        usage = CodebookUsage()
        mask = np.arange(16) < masked_in
        usage.add(counting_step(2, mesh)(codes, mask, usage.levels(mesh)))
        assert usage.num_vectors == usage.num_distinct == 9 * masked_in
        assert usage.num_entries_in_use == {0: 0, 1: 1, 5: 1, 16: 2}[masked_in]


def test_nothing_to_count():
    usage = CodebookUsage()
    assert (usage.num_vectors, usage.num_distinct, usage.num_entries_in_use) == (0, 0, 0)
    assert (usage.entropy, usage.perplexity, usage.standard_error) == (0, 1, 0)


def test_even_and_single_codes_have_the_perplexity_of_their_number():
    single = count(np.zeros((100, 4), np.int32), 10)
    assert (single.perplexity, single.entropy) == (1, 0)
    assert count(np.arange(64, dtype=np.int32)[:, None], 16).perplexity == pytest.approx(64)


@pytest.mark.parametrize("budget", [9_999, 10_000])
def test_the_budget_is_the_last_number_counted_exactly(budget):
    usage = count(np.arange(10_000, dtype=np.int32)[:, None], 1000, budget=budget)
    assert usage.is_exact == (budget == 10_000)
    assert (usage.num_distinct == 10_000) == usage.is_exact


def kept_by(codes, level):
    """The occurrences of codes [n, 4] whose fingerprint begins with `level` zero bits."""
    counter = collections.Counter(map(bytes, codes))
    hashes = (fingerprint(np.frombuffer(code, np.int32)) for code in counter)
    return [
        n for n, digest in zip(counter.values(), hashes, strict=True) if digest < 2 ** (64 - level)
    ]


@pytest.mark.parametrize("pending", [500, 2**22])
def test_the_sample_depends_on_the_codes_alone(pending, monkeypatch):
    """Not on their order, on devices, on batches, or on when the level rises, in mid-stream."""
    monkeypatch.setattr(table, "_PENDING", pending)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 9, (20_000, 4)).astype(np.int32)
    usages = [
        count(codes, 1000, budget=700),
        count(codes[::-1], 1000, devices=jax.devices(), budget=700),
        count(rng.permutation(codes), 7777, budget=700),
        count_on_host(codes, 1000, budget=700),
    ]
    kept = kept_by(codes, usages[0].level)
    assert len(kept) <= 700 < len(kept_by(codes, usages[0].level - 1))
    p = 2.0 ** -usages[0].level
    for usage in usages:
        assert usage.num_vectors == 20_000
        assert usage.num_distinct == len(kept) / p
        assert usage.standard_error == pytest.approx(math.sqrt((1 - p) / len(kept)))
        total = math.fsum(n * math.log2(n) for n in kept) / p
        assert usage.entropy == pytest.approx(math.log2(20_000) - total / 20_000, abs=1e-12)


@pytest.mark.slow
def test_errors_are_as_large_as_the_theory_says():
    """Over streams whose lengths are evenly spread, as logarithms, over one doubling.

    Flajolet (1990): the estimate is unbiased, its relative standard error 1.20 / √budget.
    Tolerances are four standard errors of what 400 streams can show (of a standard deviation:
    1 / √800 of it).
    """
    budget, num_streams = 256, 400
    rng = np.random.default_rng(0)
    errors, scaled, entropy_scaled = [], [], []
    for i in range(num_streams):
        cardinality = int(4000 * 2 ** (i / num_streams))
        counts = 1 + rng.geometric(0.3, cardinality)
        codes = rng.integers(-(2**31), 2**31, (cardinality, 4)).astype(np.int32)
        usage = count(np.repeat(codes, counts, axis=0), 2**16, budget=budget)
        assert not usage.is_exact
        errors.append(usage.num_distinct / cardinality - 1)
        scaled.append(errors[-1] / usage.standard_error)
        entropy_error = usage.entropy - entropy_of(counts.tolist())
        entropy_scaled.append(entropy_error / usage.entropy_standard_error)
    expected = 1.20 / math.sqrt(budget)
    assert abs(np.mean(errors)) < 4 * expected / math.sqrt(num_streams)
    assert np.std(errors) == pytest.approx(expected, rel=4 / math.sqrt(2 * num_streams))
    for values in (scaled, entropy_scaled):
        deviation = math.sqrt(np.mean(np.square(values)))
        assert deviation == pytest.approx(1, rel=4 / math.sqrt(2 * num_streams))


@pytest.mark.parametrize("heavy", range(6))
def test_a_heavy_code_that_the_sample_misses_widens_the_error(heavy):
    """20,000 codes once each, and one 20,000 times, which a sample of 1,000 most likely lacks."""
    rng = np.random.default_rng(heavy)
    codes = rng.integers(-(2**31), 2**31, (20_001, 4)).astype(np.int32)
    counts = np.ones(20_001, np.int64)
    counts[0] = 20_000
    usage = count(np.repeat(codes, counts, axis=0), 10_000, budget=1000)
    assert not usage.is_exact
    error = abs(usage.entropy - entropy_of(counts.tolist()))
    assert error < usage.entropy_standard_error
    assert error > 1  # bits: what there was to tell


def test_codes_that_occur_once_leave_no_doubt_about_the_entropy():
    usage = count(np.arange(100_000, dtype=np.int32)[:, None], 10_000, budget=1000)
    assert usage.entropy == pytest.approx(math.log2(100_000), abs=1e-12)
    assert usage.entropy_standard_error == 0


@pytest.mark.slow
def test_two_processes_count_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.run_counting", address, str(i)],
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = ([json.loads(x) for x in out.splitlines() if x[0] == "{"] for out, _ in outputs)
    assert first == second

    codes = stream()
    counter = collections.Counter(map(bytes, codes))
    exact, sampled = first
    assert (exact["level"], exact["num_vectors"]) == (0, len(codes))
    assert exact["num_distinct"] == len(counter)
    assert exact["entropy"] == pytest.approx(entropy_of(counter.values()), abs=1e-12)
    assert exact["num_entries_in_use"] == codes.shape[1] - 1
    alone = count(codes, 1000, budget=1000)
    assert sampled["level"] == alone.level > 0
    assert sampled["num_distinct"] == alone.num_distinct
    assert sampled["entropy"] == pytest.approx(alone.entropy, abs=1e-12)


def test_the_benchmark_counts_streams_of_known_cardinality(capsys):
    benchmark.measure_accuracy(100_000)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:] if "|" in line]
    assert rows
    for _, distinct, counted, _, stated, *_ in rows:
        assert counted == distinct
        assert stated == "exact"
