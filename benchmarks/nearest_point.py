r"""Nearest lattice points next to rounding, and for the Leech lattice next to a matrix product.

    python benchmarks/nearest_point.py [--lattices E8 Leech] [--vectors=2097152] [--repeats=7] \
        [--output=results/nearest_point.json]

The vectors have 64 entries (Leech: 72), in blocks of the lattice's dimension. "round" rounds every
entry. "product" multiplies each block with as many vectors as the Leech lattice has minimal ones,
196,560, and keeps the largest product: a search through them takes at least that.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import comparison, measure
from benchmarks.measure import Case, Contender
from llvq.errors import one_line_exit
from llvq.quantizers.nearest_point import A2, D4, E8, LEECH, Lattice
from llvq.runtime import host_memory

PROGRAM = "nearest_point.py"
LATTICES: dict[str, Lattice] = {"A2": A2, "D4": D4, "E8": E8, "Leech": LEECH}
_LENGTH = 64
_MINIMAL_VECTORS = 196_560
_BLOCKS_AT_ONCE = 256  # whose products are in memory together


def _prepare(function: Callable[[jax.Array], jax.Array], vectors: np.ndarray) -> Contender:
    on_device = jnp.asarray(vectors)
    compiled = jax.jit(function).lower(on_device).compile()
    run = measure.calls(functools.partial(compiled, on_device))
    run(1)
    return Contender(run, measure.compiled_memory(compiled))


def _product(vectors: jax.Array) -> jax.Array:
    rows = np.random.default_rng(1).normal(size=(_MINIMAL_VECTORS, LEECH.dimension))
    columns = jnp.asarray(rows.T, jnp.float32)
    blocks = vectors.reshape(-1, _BLOCKS_AT_ONCE, LEECH.dimension)
    return jax.lax.map(lambda part: jnp.max(part @ columns, axis=-1), blocks)


def _case(name: str, num_vectors: int) -> Case:
    lattice = LATTICES[name]
    num_blocks = -(-_LENGTH // lattice.dimension)
    shape = num_vectors, num_blocks, lattice.dimension
    vectors = np.random.default_rng(0).normal(scale=2, size=shape).astype(np.float32)
    contenders: dict[str, Callable[[], Contender]] = {
        "llvq": functools.partial(_prepare, lattice.nearest, vectors),
        "round": functools.partial(_prepare, jnp.round, vectors),
    }
    if name == "Leech":
        contenders["product"] = functools.partial(_prepare, _product, vectors)
    return Case({"lattice": name, "vectors": num_vectors}, num_vectors, contenders)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = comparison.make_parser(PROGRAM, __doc__)
    parser.add_argument("--lattices", nargs="+", choices=list(LATTICES), default=list(LATTICES))
    parser.add_argument(
        "--vectors", type=int, default=2**21, help="of 64 entries; Leech takes a 1,024th of them"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit(PROGRAM):
        comparison.check_options(options, "vectors")
        cases = [
            _case(name, max(options.vectors // 1024, 256) if name == "Leech" else options.vectors)
            for name in options.lattices
        ]
        comparison.record(PROGRAM, ("jax",), cases, "vectors", options)


if __name__ == "__main__":
    main()
