"""Training time and number of parameters against the codebook size: VQ and the lattice.

    python benchmarks/codebook_size.py [--repeats=5] [--output=results/codebook_size.json]

Times whole training steps of FashionMNIST's network (Adam, 64 random images), a quantizer and size
after the other in turns, and prints medians. A lattice's codebook size only sets how its basis is
initialised. --output keeps the figures; results/README.md shows those of the file named above.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from benchmarks import measure
from benchmarks.train_step import get_config, prepare_llvq
from llvq import train_state

CODEBOOK_SIZES = tuple(2**i for i in range(6, 17, 2))
QUANTIZERS = ("vq", "sparse_lattice")


def prepare(quantizer: str, codebook_size: int) -> tuple[measure.Run, int]:
    """What takes training steps, compiled, and the number of the quantizer's parameters."""
    config = get_config("fashion_mnist", quantizer)
    config.quantizer.codebook_size = codebook_size
    _, *trees = train_state.abstract_model(config.model, config.quantizer, config.compute_dtype)
    num_parameters = train_state.num_parameters([tree.get("quantizer", {}) for tree in trees])
    return prepare_llvq(config, "train").run, num_parameters


def main() -> None:
    """Prints a table in Markdown and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of every step")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the figures in")
    options = parser.parse_args()

    milliseconds: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
    parameters: dict[str, list[int]] = {name: [] for name in QUANTIZERS}
    for codebook_size in CODEBOOK_SIZES:
        prepared = {name: prepare(name, codebook_size) for name in QUANTIZERS}
        runs = {name: run for name, (run, _) in prepared.items()}
        times = measure.interleave(runs, options.repeats)
        for name, (_, num_parameters) in prepared.items():
            milliseconds[name].append(round(1e3 * statistics.median(times[name]), 2))
            parameters[name].append(num_parameters)

    header = [cell for name in QUANTIZERS for cell in (f"{name}, ms a step", "its parameters")]
    columns = [figures[name] for name in QUANTIZERS for figures in (milliseconds, parameters)]
    rows = ([f"{x:,.0f}" for x in row] for row in zip(CODEBOOK_SIZES, *columns, strict=True))
    table = measure.table(["K", *header], rows)
    print(table)
    measured = {
        "machine": measure.machine(),
        "command": " ".join(["python", *sys.argv]),
        "codebook_sizes": CODEBOOK_SIZES,
        "milliseconds": milliseconds,
        "parameters": parameters,
        "table": table,
    }
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
