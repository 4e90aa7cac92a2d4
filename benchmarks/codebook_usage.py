"""How exact counting codes is, and what it costs; prints Markdown tables.

    python benchmarks/codebook_usage.py accuracy --max-cardinality=1e9
    python benchmarks/codebook_usage.py cost --batch-size=2

accuracy: streams whose distinct codes and entropy are known, through device and table as in an
evaluation. Either every code occurs once; or there are four times as many vectors as codes and the
k-th code occurs about k^(−2/3) as often as the first (up to a tenth of --max-cardinality).

cost: of counting the codes of images of FFHQ's shape with FFHQ's network, in percent of what the
same pass takes without: one pass measures images, the other only encodes them. Nothing overlaps,
and merging the table counts, so an evaluation pays less. In a dense lattice almost all codes
differ, which is the worst case. Steps with and without counting take turns.
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
from llvq import VQVAE, LatticeQuantizer
from llvq.evaluate import measure_images
from llvq.runtime import sharding
from llvq.training.train_step import scale_images
from llvq.usage.counting import CodeCounts, count_codes
from llvq.usage.table import CodebookUsage

_STREAM_BATCH = 2**21
_LATENT_DIM = 64
_HIDDEN_DIMS = (16, 32)
_IMAGE_SHAPE = (1024, 1024, 3)

Codes = Int32[np.ndarray, "n"]


def _each_once(cardinality: int) -> Iterator[Codes]:
    for start in range(0, cardinality, _STREAM_BATCH):
        yield np.arange(start, min(start + _STREAM_BATCH, cardinality), dtype=np.int32)


def _skewed(cardinality: int) -> Iterator[Codes]:
    num_vectors = 4 * cardinality
    for start in range(0, num_vectors, _STREAM_BATCH):
        positions = np.arange(start, min(start + _STREAM_BATCH, num_vectors))
        # The cube rises by at most 3/4 from one position to the next: no code is left out.
        yield (cardinality * (positions / num_vectors) ** 3).astype(np.int32)


def _entropy(stream: Iterator[Codes], cardinality: int) -> float:
    """In bits, with a counter for each code: the codes ascend."""
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
        # Each code as an image of a single row.
        current = step(padded[:, None], mask, usage.levels(mesh))
        if previous is not None:
            usage.add(previous)
        previous = current
    if previous is not None:
        usage.add(previous)
    return usage


def measure_accuracy(max_cardinality: int) -> None:
    """Prints a row for each stream: figures, their errors and the standard errors stated."""
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    step = jax.jit(functools.partial(count_codes, code_width=1, mesh=mesh))
    _count_stream(step, _each_once(1), mesh)  # compiles
    print(
        "| stream | distinct | counted | error | stated | entropy | error | stated | ns a vector |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, make_stream, largest in (
        ("each once", _each_once, max_cardinality),
        ("skewed", _skewed, max_cardinality // 10),
    ):
        cardinality = 10**5
        while cardinality <= largest:
            stream = make_stream(cardinality)
            start = time.perf_counter()
            usage = _count_stream(step, stream, mesh)
            counted = usage.num_distinct
            nanoseconds = 1e9 * (time.perf_counter() - start) / usage.num_vectors
            once = make_stream is _each_once
            entropy = (
                float(np.log2(cardinality))
                if once
                else _entropy(make_stream(cardinality), cardinality)
            )
            print(
                f"| {name} | {cardinality:,} | {counted:,} | {counted / cardinality - 1:+.4%} "
                f"| {'exact' if usage.is_exact else f'±{usage.standard_error:.4%}'} "
                f"| {entropy:.5f} | {usage.entropy - entropy:+.1e} "
                f"| ±{usage.entropy_standard_error:.1e} | {nanoseconds:.0f} |",
                flush=True,
            )
            cardinality *= 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory of the process: {peak:.2f} GiB")


def _model(basis: float) -> VQVAE:
    """FFHQ's network with its initial weights, and a lattice as fine as asked."""
    rngs = nnx.Rngs(0)
    quantizer = LatticeQuantizer(_LATENT_DIM, rngs=rngs)
    quantizer.basis[...] = jnp.full(_LATENT_DIM, basis)
    return VQVAE(quantizer, image_channels=3, hidden_dims=_HIDDEN_DIMS, rngs=rngs)


def _encode(model: VQVAE, images: Array, mask: Array, mesh: Mesh) -> tuple[tuple[()], Array]:
    del mask
    images, packing = model.pack(images, mesh)
    return (), model.encode(scale_images(images, (0.0, 1.0), jnp.float32), packing)


def _measure(
    model: VQVAE, images: Array, mask: Array, mesh: Mesh
) -> tuple[dict[str, Array], Array]:
    return measure_images(model, images, mask, (0.0, 1.0), jnp.float32, mesh)


def _cost(
    model: VQVAE, work: Callable[..., Any], images: np.ndarray, repeats: int
) -> tuple[float, float, float, float]:
    """(different codes, all as 1; seconds a batch without counting; with it; for merging)."""
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    graphdef, params = nnx.split(model)
    inputs = [sharding.to_devices(x, mesh) for x in (images, np.ones(len(images), bool))]

    @jax.jit
    def without(params: Any, images: Array, mask: Array) -> Any:
        return work(nnx.merge(graphdef, params), images, mask, mesh)

    @jax.jit
    def counting(params: Any, images: Array, mask: Array, levels: Array) -> Any:
        results, codes = work(nnx.merge(graphdef, params), images, mask, mesh)
        return results, count_codes(codes, mask, levels, code_width=_LATENT_DIM, mesh=mesh)

    def run_without(num_steps: int) -> None:
        for _ in range(num_steps):
            jax.block_until_ready(without(params, *inputs))

    def run_counting(num_steps: int) -> None:
        for _ in range(num_steps):
            results, counts = counting(params, *inputs, usage.levels(mesh))
            usage.add(counts)
            jax.block_until_ready(results)

    runs = {"without": run_without, "with": run_counting}
    usage = CodebookUsage()
    measure.interleave(runs, 1)
    usage = CodebookUsage()  # what compiles does not count
    times = measure.interleave(runs, repeats)
    start = time.perf_counter()
    distinct = usage.num_distinct / (usage.num_vectors / repeats)
    merging = (time.perf_counter() - start) / repeats
    without_counting, with_counting = map(statistics.median, times.values())
    return distinct, without_counting, with_counting, merging


def measure_cost(batch_size: int, repeats: int) -> None:
    """Prints a row for each lattice and pass: seconds without counting, and what it adds."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *_IMAGE_SHAPE), np.uint8)
    print("| lattice | different codes | pass | without | with | merging | cost |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for lattice, basis in (("dense", 1e-5), ("sparse", 0.1)):
        for name, work in (("measure", _measure), ("encode", _encode)):
            distinct, without, counting, merging = _cost(_model(basis), work, images, repeats)
            print(
                f"| {lattice} | {distinct:.2%} | {name} | {without:.3f} s | {counting:.3f} s "
                f"| {merging:.3f} s | {(counting + merging) / without - 1:+.1%} |",
                flush=True,
            )


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    accuracy = commands.add_parser("accuracy")
    accuracy.add_argument("--max-cardinality", type=float, default=1e7)
    accuracy.set_defaults(run=lambda options: measure_accuracy(int(options.max_cardinality)))
    cost = commands.add_parser("cost")
    cost.add_argument("--batch-size", type=int, default=2, help="images a step")
    cost.add_argument("--repeats", type=int, default=5)
    cost.set_defaults(run=lambda options: measure_cost(options.batch_size, options.repeats))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
