r"""What the steps of training and evaluation cost on TPUs, as reported by the TPU compiler.

    python benchmarks/tpu_compile.py [--datasets ffhq1024] [--quantizers vq sparse_lattice] \
        [--topologies v5e:1x1 v5e:2x4] [--steps train] [--compute-dtype=bfloat16] \
        [--batch-size=32] [--output=results/tpu_compile.json]

Needs no TPU, only its compiler: pip install "jax[tpu]". Memory, bytes, FLOPs and cycles are what
the compiler counts in the compiled program of one chip. The times are estimates, not measurements:
the least time that those bytes take at the speed of the chip's memory, that arithmetic at the
chip's peak, and the collectives (a roofline). Both have their flaws: accesses to buffers that fit
on the chip count among the bytes, though they are faster; the cycles, by which the compiler plans,
leave out the collectives.

A batch is the config's, over all chips of the slice. If it cannot be shared by so many chips, each
chip gets an eighth of it. Efficiency (weak scaling) is the time of one chip with as many images
over the time of the slice; the program of that one chip is compiled, too.

Compiling takes from seconds to minutes per step. --output keeps every number as soon as it is
known, and a table beside it in Markdown. A second call compiles only what the same compiler has not
compiled yet. Delete the file after a change to the network.
"""

import argparse
import importlib.util
import itertools
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

# Only libtpu's compiler is used: it must not search for a TPU and its hosts, nor lock one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import optax
from flax import nnx
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import measure, store
from benchmarks.settings import DATASETS, abstract_model, create_model, get_config, objective
from benchmarks.store import Row
from llvq.config import TrainConfig
from llvq.errors import UserError, first_line, one_line_exit
from llvq.evaluation.steps import make_steps
from llvq.models.factory import latent_shape
from llvq.quantizers import QUANTIZERS
from llvq.runtime import sharding
from llvq.runtime.console import markdown_table
from llvq.training.train_state import create_train_state
from llvq.training.train_step import make_train_step

STEPS = ("train", "evaluate")
TOPOLOGIES = ("v5e:2x4", "v5e:4x8", "v5e:16x16")

_LIMITS = ("memory", "arithmetic", "collective")
_SETTING = ("dataset", "quantizer", "step", "topology", "batch_size", "compute_dtype", "compiler")


class Chip(NamedTuple):
    """One TPU chip (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).

    Attributes:
      memory: in GB.
      bandwidth: of the memory, in GB/s.
      arithmetic: in bfloat16, which float32 convolutions use as well, in TFLOP/s.
      interconnect: what the chip can send over all its links at once, in GB/s.
      largest: the largest slice.
    """

    memory: int
    bandwidth: int
    arithmetic: int
    interconnect: int
    largest: str


CHIPS = {
    "v4": Chip(32, 1228, 275, 300, "12x16x16"),
    "v5e": Chip(16, 819, 197, 200, "16x16"),
    "v5p": Chip(95, 2765, 459, 600, "16x16x24"),
    "v6e": Chip(32, 1640, 918, 400, "16x16"),
}

# How often the bytes of a collective's result leave each chip, at least. Those of an all-reduce
# leave it twice: to be summed, and as sums.
_COLLECTIVES = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
}
_SECONDS_PER_HOP = 1e-6  # https://jax-ml.github.io/scaling-book/sharding


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the slice's shape of a name like "v5e:2x4".

    Raises:
      UserError: if there is no such chip, or no such slice of its pods.
    """
    kind, _, text = name.partition(":")
    if kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        shape = tuple(map(int, text.split("x")))
        largest = tuple(map(int, CHIPS[kind].largest.split("x")))
        if len(shape) == len(largest) and math.prod(shape) <= math.prod(largest):
            return CHIPS[kind], shape
    known = ", ".join(f"{kind}:… up to {chip.largest}" for kind, chip in CHIPS.items())
    raise UserError(f"--topologies: there is no {name!r}; known are {known}")


def get_devices(topology: str) -> Sequence[jax.Device]:
    """Returns all chips of a slice that need not exist.

    Raises:
      UserError: if the compiler knows no such slice.
    """
    _, shape = parse_topology(topology)
    # Otherwise the two cores of a v4 chip appear as two devices. Most hosts have four chips.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology[:2] == "v4" else {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topologies: {topology}: {first_line(error)}") from error


def _mesh(config: TrainConfig, batch_size: int, devices: Sequence[jax.Device]) -> Mesh:
    latent_height, _ = latent_shape(abstract_model(config), config.model.image_shape)
    return sharding.mesh_for_batches(batch_size, latent_height, devices)


def lower(row: Row) -> jax.stages.Lowered:
    """Lowers the step of a row, ready to be compiled."""
    config = get_config(
        row["dataset"],
        row["quantizer"],
        batch_size=row["batch_size"],
        compute_dtype=row["compute_dtype"],
    )
    devices = get_devices(row["topology"])
    mesh = _mesh(config, config.batch_size, devices)
    model = abstract_model(config, mesh)
    graphdef = nnx.graphdef(model)
    schedule = optax.constant_schedule(config.learning_rate)
    optimizer = optax.adam(schedule)
    state = jax.eval_shape(lambda: create_train_state(create_model(config, mesh), optimizer))
    images = jax.ShapeDtypeStruct((config.batch_size, *config.model.image_shape), jnp.uint8)
    step: Any
    if row["step"] == "train":
        step, _ = make_train_step(graphdef, objective(config), optimizer, schedule, mesh)
        return step.lower(state, images)
    step = make_steps(graphdef, objective(config), mesh).measure
    mask = jax.ShapeDtypeStruct((config.batch_size,), jnp.bool)
    return step.lower(state, images, mask, jax.ShapeDtypeStruct((mesh.size,), jnp.int32))


def count_collectives(program: str) -> dict[str, dict[str, int]]:
    """Counts the collectives of each kind in a compiled program, and the bytes of their results."""
    counted: dict[str, dict[str, int]] = {}
    # An asynchronous collective counts where it ends; its start returns the operands, too.
    pattern = rf" = (.*?) ({'|'.join(_COLLECTIVES)})(?:-done)?\("
    for shapes, kind in re.findall(pattern, program):
        total = counted.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += 1
        for bits, shape in re.findall(r"\b[a-z]+(\d*)\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in shape.split(",") if n)
            total["bytes"] += size * max(int(bits or 8) // 8, 1)
    return counted


def count_cycles(program: str) -> int:
    """Adds up the cycles of a compiled program's instructions, without the collectives."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program)))


def _collective_seconds(
    chip: Chip, shape: Sequence[int], collectives: dict[str, dict[str, int]]
) -> float:
    """Each takes as long as its bytes need to leave the chip, or to reach the farthest chip."""
    hops = sum(length // 2 for length in shape)  # every dimension of a slice is a ring
    return sum(
        _COLLECTIVES[kind]
        * max(
            total["bytes"] / chip.interconnect / 1e9,
            total["count"] * _SECONDS_PER_HOP * (1 if kind == "collective-permute" else hops),
        )
        for kind, total in collectives.items()
    )


def compile_row(setting: Row) -> Row:
    """Compiles the step of a setting, and adds what the compiler reports."""
    chip, shape = parse_topology(setting["topology"])
    start = time.monotonic()
    try:
        compiled = lower(setting).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([MG]) of", str(error))
        if used is None:
            raise
        size = float(used[1]) * 2 ** {"M": 20, "G": 30}[used[2]]
        return {**setting, "fits": False, "memory_bytes": size}
    seconds = time.monotonic() - start
    cost: Any = compiled.cost_analysis()
    program = compiled.as_text() or ""
    collectives = count_collectives(program)
    return {
        **setting,
        "fits": True,
        "memory_bytes": measure.compiled_memory(compiled),
        "bytes_accessed": cost["bytes accessed"],
        "flops": cost["flops"],
        "cycles": count_cycles(program),
        "memory_seconds": cost["bytes accessed"] / chip.bandwidth / 1e9,
        "arithmetic_seconds": cost["flops"] / chip.arithmetic / 1e12,
        "collective_seconds": _collective_seconds(chip, shape, collectives),
        "collectives": collectives,
        "compile_seconds": round(seconds, 1),
    }


def _one_chip(topology: str) -> str:
    """Names a single chip of a slice's kind, e.g. "v5e:1x1"."""
    kind, _, shape = topology.partition(":")
    return f"{kind}:{re.sub(r'[0-9]+', '1', shape)}"


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """Yields all settings asked for, and the one chip that each slice's training is compared with.

    Raises:
      UserError: if a batch cannot be split over the chips.
    """
    compiler = f"libtpu {metadata.version('libtpu')}, jax {jax.__version__}"
    for topology, dataset, quantizer, step in itertools.product(
        options.topologies, options.datasets, options.quantizers, options.steps
    ):
        devices = get_devices(topology)
        config = get_config(dataset, quantizer)
        batch_size = options.batch_size or config.batch_size
        try:
            _mesh(config, batch_size, devices)
        except UserError as error:
            if options.batch_size:
                raise UserError(f"{topology}: {error}") from error
            batch_size = batch_size // 8 * len(devices)
        wanted = [(topology, batch_size)]
        images, remainder = divmod(batch_size, len(devices))
        if step == "train" and len(devices) > 1 and not remainder:
            wanted.insert(0, (_one_chip(topology), images))
        for name, size in wanted:
            values = dataset, quantizer, step, name, size, options.compute_dtype, compiler
            yield dict(zip(_SETTING, values, strict=True))


def _key(setting: Row) -> tuple[Any, ...]:
    return tuple(setting[name] for name in _SETTING)


def _roofline_seconds(row: Row) -> float:
    # The collectives come last: while the gradients are summed, nothing is left to compute.
    return max(row["memory_seconds"], row["arithmetic_seconds"]) + row["collective_seconds"]


def _efficiency(row: Row, by_key: Mapping[tuple[Any, ...], Row]) -> float | None:
    """Divides the time of one chip with as many images by the slice's; None if one is unknown."""
    chips = math.prod(parse_topology(row["topology"])[1])
    alone = {"topology": _one_chip(row["topology"]), "batch_size": row["batch_size"] / chips}
    one_chip = by_key.get(_key({**row, **alone}))
    if chips == 1 or one_chip is None or not one_chip["fits"]:
        return None
    return _roofline_seconds(one_chip) / _roofline_seconds(row)


def _position(row: Row) -> tuple[Any, ...]:
    """Returns the key that sorts the table."""
    chips = math.prod(parse_topology(row["topology"])[1])
    kind, _, _ = row["topology"].partition(":")
    places = ((DATASETS, "dataset"), (STEPS, "step"), (tuple(QUANTIZERS), "quantizer"))
    dataset, step, quantizer = (choices.index(row[name]) for choices, name in places)
    return dataset, step, kind, chips, row["batch_size"], quantizer, row["compute_dtype"]


_COLUMNS = (
    "data set",
    "step",
    "quantizer",
    "slice",
    "images per chip",
    "dtype",
    "memory, GB",
    "GB accessed",
    "GFLOP",
    "million cycles",
    "memory, ms",
    "arithmetic, ms",
    "collectives, ms",
    "images/s per chip",
    "efficiency",
    "collectives",
)


def table(rows: Sequence[Row]) -> str:
    """Makes a table of all rows; bytes, FLOPs and times are per chip and step."""
    by_key = {_key(row): row for row in rows}
    lines = []
    for row in sorted(rows, key=_position):
        chip, shape = parse_topology(row["topology"])
        images = row["batch_size"] / math.prod(shape)
        memory = f"{row['memory_bytes'] / 1e9:.3g} of {chip.memory}"
        cells = [row["dataset"], row["step"], f"`{row['quantizer']}`", row["topology"]]
        cells += [f"{images:g}", row["compute_dtype"]]
        if row["fits"]:
            efficiency = _efficiency(row, by_key)
            collectives = (
                f"{total['count']} {kind}, {total['bytes']:,} B"
                for kind, total in row["collectives"].items()
            )
            cells += [memory, f"{row['bytes_accessed'] / 1e9:.3g}", f"{row['flops'] / 1e9:.3g}"]
            cells.append(f"{row['cycles'] / 1e6:.3g}")
            cells += [f"{1e3 * row[f'{limit}_seconds']:.3g}" for limit in _LIMITS]
            cells.append(f"{images / _roofline_seconds(row):,.0f}")
            cells.append("" if efficiency is None else f"{efficiency:.1%}")
            cells.append("; ".join(collectives))
        else:
            cells += [f"**{memory}: does not fit**", *[""] * 9]
        lines.append(cells)
    return markdown_table(_COLUMNS, lines)


_HEADER = """# The steps on TPUs, as reported by the TPU compiler

benchmarks/tpu_compile.py wrote this page and says what the columns mean; do not edit it by hand.
Compiled with {compilers}.

"""


def _report(rows: Sequence[Row]) -> str:
    compilers = "; ".join(sorted({row["compiler"] for row in rows}))
    return _HEADER.format(compilers=compilers) + table(rows) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = store.make_parser("tpu_compile.py", __doc__)
    for name, choices in (("datasets", DATASETS), ("quantizers", QUANTIZERS), ("steps", STEPS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument(
        "--topologies", nargs="+", default=TOPOLOGIES, metavar="CHIP:SHAPE", help=", ".join(CHIPS)
    )
    parser.add_argument("--batch-size", type=int, default=0, help="over all chips")
    parser.add_argument(
        "--compute-dtype", choices=["float32", "bfloat16"], default="float32", metavar="DTYPE"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    with one_line_exit("tpu_compile.py"):
        for topology in options.topologies:
            parse_topology(topology)
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('the TPU compiler is not installed: pip install "jax[tpu]"')
        kept = store.Store(options.output, _report, _SETTING)
        wanted = {_key(setting): setting for setting in settings(options)}.values()
        missing = [setting for setting in wanted if not kept.find(setting)]
        for setting in store.progress(missing, store.words):
            kept.add(compile_row(setting))
        print(table([row for setting in wanted if (row := kept.find(setting))]))


if __name__ == "__main__":
    main()
