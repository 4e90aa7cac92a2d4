"""Time of a training step against codebook size, batch size and image size: VQ and the lattice.

    python benchmarks/sweep.py [--repeats=5] [--output=results/sweep.json]

Times whole training steps of FashionMNIST's network (Adam, random images): a codebook of 512, 64
images of 28×28, and each of the three over a range, with 8 images where their size varies. The two
quantizers run in turns; printed are medians. A lattice's codebook size only sets how its basis is
initialised. --output keeps the figures; results/README.md shows those of the file named above.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from benchmarks import measure
from benchmarks.train_step import get_config, prepare_llvq
from llvq.runtime import host_memory
from llvq.training import train_state

_CODEBOOK_SIZE = "codebook size K"
SWEEPS = {
    _CODEBOOK_SIZE: tuple(2**i for i in range(6, 17, 2)),
    "images a step": tuple(2**i for i in range(3, 10)),
    "height and width of the images": (28, 56, 84, 112, 168, 224),
}
QUANTIZERS = ("vq", "sparse_lattice")

_BATCH_SIZE_OF_IMAGE_SIZES = 8


def make_config(quantizer: str, name: str, value: int) -> Any:
    """FashionMNIST's config with one value of a sweep."""
    config = get_config("fashion_mnist", quantizer)
    if name == _CODEBOOK_SIZE:
        config.quantizer.codebook_size = value
    elif name == "images a step":
        config.batch_size = value
    else:
        config.batch_size = _BATCH_SIZE_OF_IMAGE_SIZES
        config.model.image_shape = (value, value, 1)
    return config


def measure_sweep(name: str, repeats: int) -> dict[str, Any]:
    """Figures of one sweep: milliseconds for each value, of codebook sizes parameters as well."""
    milliseconds: dict[str, list[float]] = {quantizer: [] for quantizer in QUANTIZERS}
    parameters: dict[str, list[int]] = {quantizer: [] for quantizer in QUANTIZERS}
    for value in SWEEPS[name]:
        print(name, value, file=sys.stderr, flush=True)
        configs = {quantizer: make_config(quantizer, name, value) for quantizer in QUANTIZERS}
        runs = {key: prepare_llvq(config, "train").run for key, config in configs.items()}
        times = measure.interleave(runs, repeats)
        for key, config in configs.items():
            milliseconds[key].append(round(1e3 * statistics.median(times[key]), 2))
            sections = config.model, config.quantizer, config.compute_dtype
            _, *trees = train_state.abstract_model(*sections)
            of_quantizer = [tree.get("quantizer", {}) for tree in trees]
            parameters[key].append(train_state.num_parameters(of_quantizer))
    measured = {"values": SWEEPS[name], "milliseconds": milliseconds}
    return measured | {"parameters": parameters} if name == _CODEBOOK_SIZE else measured


def table(name: str, sweep: dict[str, Any]) -> str:
    """A sweep in Markdown, with what changes over it."""
    header, columns = [name], [[f"{value:,}" for value in sweep["values"]]]
    for quantizer in QUANTIZERS:
        header.append(f"{quantizer}, ms a step")
        columns.append([f"{float(f'{ms:.3g}'):,g}" for ms in sweep["milliseconds"][quantizer]])
        if "parameters" in sweep:
            header.append("its parameters")
            columns.append([f"{n:,}" for n in sweep["parameters"][quantizer]])
    return measure.table(header, zip(*columns, strict=True))


def main() -> None:
    """Prints the tables in Markdown and keeps the figures."""
    host_memory.keep_freed_memory()  # as main.py does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of every step")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the figures in")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats}: must be at least 1")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output={options.output}: there is no directory {options.output.parent}")
    sweeps = {name: measure_sweep(name, options.repeats) for name in SWEEPS}
    for name, sweep in sweeps.items():
        sweep["table"] = table(name, sweep)
        print(sweep["table"] + "\n")
    if not options.output:
        return
    measured = {
        "machine": measure.machine(),
        "command": " ".join(["python", *sys.argv]),
        "sweeps": sweeps,
    }
    options.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
