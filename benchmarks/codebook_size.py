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
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from configs import fashion_mnist
from llvq import sharding, train_state
from llvq.train_step import make_train_step

CODEBOOK_SIZES = tuple(2**i for i in range(6, 17, 2))
QUANTIZERS = ("vq", "sparse_lattice")


def prepare(quantizer: str, codebook_size: int) -> tuple[Callable[[], None], int]:
    """A function that takes one training step, compiled, and the quantizer's parameters."""
    config = fashion_mnist.get_config(quantizer)
    if "codebook_size" in config.quantizer:
        config.quantizer.codebook_size = codebook_size
    mesh = sharding.make_mesh(jax.devices()[:1])
    optimizer = optax.adam(config.learning_rate)
    model = train_state.create_model(
        config.model, config.quantizer, config.compute_dtype, config.seed
    )
    graphdef, state = train_state.create_train_state(model, optimizer)
    num_parameters = train_state.num_quantizer_parameters(state)
    _, param_dtype = train_state.DTYPES[config.compute_dtype]
    step, _ = make_train_step(graphdef, optimizer, config.model.value_range, param_dtype, mesh)
    shape = (config.batch_size, *config.model.image_shape)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)
    holder: list[Any] = [state]

    def take_step() -> None:
        holder[0], _ = step(holder[0], images)
        jax.block_until_ready(holder[0])

    take_step()
    return take_step, num_parameters


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
        times: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
        for _ in range(options.repeats):
            for name, (take_step, _) in prepared.items():
                start = time.perf_counter()
                take_step()
                times[name].append(time.perf_counter() - start)
        for name, (_, num_parameters) in prepared.items():
            milliseconds[name].append(round(1e3 * statistics.median(times[name]), 2))
            parameters[name].append(num_parameters)

    lines = [
        "| K |" + "".join(f" {name}, ms a step | its parameters |" for name in QUANTIZERS),
        "|---" * (1 + 2 * len(QUANTIZERS)) + "|",
    ]
    for i, codebook_size in enumerate(CODEBOOK_SIZES):
        cells = (
            f" {milliseconds[name][i]:,.0f} | {parameters[name][i]:,} |" for name in QUANTIZERS
        )
        lines.append(f"| {codebook_size:,} |" + "".join(cells))
    table = "\n".join(lines)
    print(table)
    measured = {
        "machine": sharding.describe(sharding.make_mesh()),
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
