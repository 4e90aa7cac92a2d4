"""How exact counting codes is, and what it costs; prints Markdown tables.

    python benchmarks/codebook_usage.py accuracy --max-cardinality=1e9
    python benchmarks/codebook_usage.py cost --batch-size=2

accuracy: streams with a known number of distinct codes and a known entropy pass through device and
table as in an evaluation. Either every code occurs once; or there are four times as many vectors as
codes, and the k-th code occurs about k^(−2/3) times as often as the first (up to a tenth of
--max-cardinality).

cost: what counting adds to a pass over images of FFHQ's shape with FFHQ's network, in percent. One
pass measures images, the other only encodes them. Here nothing overlaps, and merging the table
counts, so an evaluation pays less. In a dense lattice almost all codes differ, which is the worst
case. Steps with and without counting take turns.
"""

import argparse
import functools
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int32

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from benchmarks import measure
from benchmarks.settings import create_model, get_config
from benchmarks.train_step import random_images
from llvq.evaluation.steps import measure_images
from llvq.models import VQVAE
from llvq.runtime import sharding
from llvq.runtime.console import markdown_table
from llvq.training.objective import Objective, default_weights
from llvq.usage import CodebookUsage, CodeCounts, count_codes

_STREAM_BATCH = 2**21

Codes = Int32[np.ndarray, "n"]


def _each_once(cardinality: int) -> Iterator[Codes]:
    for start in range(0, cardinality, _STREAM_BATCH):
        yield np.arange(start, min(start + _STREAM_BATCH, cardinality), dtype=np.int32)


def _skewed(cardinality: int) -> Iterator[Codes]:
    num_vectors = 4 * cardinality
    for start in range(0, num_vectors, _STREAM_BATCH):
        positions = np.arange(start, min(start + _STREAM_BATCH, num_vectors))
        # From one position to the next, the cube rises by at most 3/4, so no code is left out.
        yield (cardinality * (positions / num_vectors) ** 3).astype(np.int32)


def _entropy(stream: Iterator[Codes], cardinality: int) -> float:
    """Computes the entropy of ascending codes in bits, with a counter for each code."""
    counts = np.zeros(cardinality, np.int32)
    for codes in stream:
        first = int(codes[0])
        found = np.bincount(codes - first)
        counts[first : first + len(found)] += found.astype(np.int32)
    if not counts.all():
        raise AssertionError("a code is missing from the stream")
    total = counts.sum(dtype=np.int64)
    return float(np.log2(total) - np.sum(counts * np.log2(counts)) / total)


def _count_stream(
    step: Callable[..., CodeCounts], stream: Iterator[Codes], mesh: Mesh
) -> CodebookUsage:
    usage = CodebookUsage()
    previous: CodeCounts | None = None
    for codes in stream:
        mask = np.arange(_STREAM_BATCH) < len(codes)
        padded = np.pad(codes, (0, _STREAM_BATCH - len(codes)))
        # Each code is an image of a single row.
        current = step(padded[:, None], mask, usage.levels(mesh))
        if previous is not None:
            usage.add(previous)
        previous = current
    if previous is not None:
        usage.add(previous)
    return usage


def measure_accuracy(max_cardinality: int) -> None:
    """Prints a row for each stream: counts, their errors, and the standard errors stated."""
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    step = jax.jit(functools.partial(count_codes, code_width=1, mesh=mesh))
    _count_stream(step, _each_once(1), mesh)  # compiles
    lines = []
    for name, make_stream, largest in (
        ("each once", _each_once, max_cardinality),
        ("skewed", _skewed, max_cardinality // 10),
    ):
        cardinality = 10**5
        while cardinality <= largest:
            print(f"{name}: {cardinality:,} codes", file=sys.stderr, flush=True)
            start = time.perf_counter()
            usage = _count_stream(step, make_stream(cardinality), mesh)
            counted = usage.num_distinct
            nanoseconds = 1e9 * (time.perf_counter() - start) / usage.num_vectors
            if make_stream is _each_once:
                entropy = float(np.log2(cardinality))
            else:
                entropy = _entropy(make_stream(cardinality), cardinality)
            line = [name, f"{cardinality:,}", f"{counted:,}", f"{counted / cardinality - 1:+.4%}"]
            line.append("exact" if usage.is_exact else f"±{usage.standard_error:.4%}")
            line += [f"{entropy:.5f}", f"{usage.entropy - entropy:+.1e}"]
            line += [f"±{usage.entropy_standard_error:.1e}", f"{nanoseconds:.0f}"]
            lines.append(line)
            cardinality *= 10
    header = ["stream", "distinct", "counted", "error", "stated", "entropy", "error", "stated"]
    print(markdown_table([*header, "ns per vector"], lines))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory of the process: {peak:.2f} GiB")


def _measure(model: VQVAE, images: Array, mask: Array) -> tuple[Any, Array]:
    return measure_images(model, Objective(default_weights()), images, mask)


def _encode(model: VQVAE, images: Array, mask: Array) -> tuple[tuple[()], Array]:
    del mask
    return (), model.encode(images)


def _cost(
    work: Callable[..., Any], basis: float, batch_size: int, repeats: int
) -> tuple[float, float, float, float]:
    """(share of codes that differ; seconds per batch without and with counting; for merging).

    Args:
      work: maps (model, images, mask) to (results, codes).
      basis: every entry of the lattice's basis.
      batch_size: images per step.
      repeats: how often each step is timed.
    """
    config = get_config("ffhq1024", "sparse_lattice", batch_size=batch_size)
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    model = create_model(config, mesh)
    quantizer: Any = model.quantizer
    quantizer.basis[...] = jnp.full_like(quantizer.basis[...], basis)
    graphdef, params = nnx.split(model)
    mask = np.ones(batch_size, bool)
    inputs = [sharding.to_devices(x, mesh) for x in (random_images(config), mask)]

    @jax.jit
    def without(params: Any, images: Array, mask: Array) -> Any:
        return work(nnx.merge(graphdef, params), images, mask)

    @jax.jit
    def counting(params: Any, images: Array, mask: Array, levels: Array) -> Any:
        results, codes = work(nnx.merge(graphdef, params), images, mask)
        width = model.quantizer.code_width
        return results, count_codes(codes, mask, levels, code_width=width, mesh=mesh)

    def count_into(usage: CodebookUsage) -> Any:
        results, counts = counting(params, *inputs, usage.levels(mesh))
        usage.add(counts)
        return results

    run_without = measure.calls(functools.partial(without, params, *inputs))
    usage = CodebookUsage()
    run_counting = measure.calls(functools.partial(count_into, usage))
    run_without(1)
    measure.calls(functools.partial(count_into, CodebookUsage()))(1)  # compiles
    times = measure.interleave({"without": run_without, "with": run_counting}, repeats)
    start = time.perf_counter()
    distinct = usage.num_distinct / (usage.num_vectors / repeats)
    merging = (time.perf_counter() - start) / repeats
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return distinct, seconds["without"], seconds["with"], merging


def measure_cost(batch_size: int, repeats: int) -> None:
    """Prints a row for each lattice and pass: seconds without counting, and what it adds."""
    lines = []
    for lattice, basis in (("dense", 1e-5), ("sparse", 0.1)):
        for name, work in (("measure", _measure), ("encode", _encode)):
            print(f"{lattice} lattice, {name}", file=sys.stderr, flush=True)
            distinct, without, counting, merging = _cost(work, basis, batch_size, repeats)
            line = [lattice, f"{distinct:.2%}", name]
            line += [f"{seconds:.3f} s" for seconds in (without, counting, merging)]
            lines.append([*line, f"{(counting + merging) / without - 1:+.1%}"])
    header = ["lattice", "different codes", "pass", "without", "with", "merging", "cost"]
    print(markdown_table(header, lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    accuracy = commands.add_parser("accuracy")
    accuracy.add_argument("--max-cardinality", type=float, default=1e7)
    accuracy.set_defaults(run=lambda options: measure_accuracy(int(options.max_cardinality)))
    cost = commands.add_parser("cost")
    cost.add_argument("--batch-size", type=int, default=2, help="images per step")
    cost.add_argument("--repeats", type=int, default=5)
    cost.set_defaults(run=lambda options: measure_cost(options.batch_size, options.repeats))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
