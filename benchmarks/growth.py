r"""Speed and memory against the size of the images, and what breaks first.

    python benchmarks/growth.py [--steps train encode] [--sizes 64 1024] [--batch-sizes 1 8] \
        [--seconds=300] [--output=results/growth.json]

Runs FFHQ's network with `sparse_lattice` on random images of each size, one size and batch per
process: the steps of train_step.py, from training to the codec's passes. On a CPU a process may
address as much memory as is free. Where a step needs more, or takes too long, larger images are not
tried, and the table has the message that the process ended with. Memory is XLA's plan for a step,
and the most that the process held; bytes are what the step reads and writes, as XLA counts them.
--output keeps each number as soon as it is known, with a table and a plot beside it; a second call
continues.
"""

import argparse
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, os.fspath(ROOT))

import jax
import numpy as np

from benchmarks import measure, store
from benchmarks.settings import get_config
from benchmarks.store import Row, number
from benchmarks.train_step import STEPS, prepare
from llvq.errors import naming_lack_of_memory, one_line_exit
from llvq.runtime import host_memory
from llvq.runtime.console import markdown_table

PROGRAM = "growth.py"
_REPEATS = 3
_TOOK_LONG = "took more than"


def run_once(step: str, batch_size: int, size: int) -> Row:
    """Measures a step in this process."""
    config = get_config("ffhq1024", "sparse_lattice", batch_size=batch_size, image_size=size)
    contender = prepare(config, step)
    seconds = measure.interleave({step: contender.run}, _REPEATS)[step]
    return {
        "seconds": seconds,
        "memory_bytes": contender.memory_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_accessed": contender.work.get("memory"),
    }


def run_apart(step: str, batch_size: int, size: int, seconds: int) -> Row:
    """Measures a step in a process of its own, or returns the message that it ended with."""
    command = [sys.executable, __file__, f"--steps={step}", f"--sizes={size}", "--here"]
    try:
        result = subprocess.run(
            [*command, f"--batch-sizes={batch_size}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"{_TOOK_LONG} {seconds} s"}
    if result.returncode == 0:
        row: Row = json.loads(result.stdout.splitlines()[-1])
        return row
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return {"ended": lines[-1].removeprefix(f"{PROGRAM}: ")}


def _limit_memory() -> None:
    """Lets this process address only as much memory as is free, so that it ends with a message."""
    meminfo = pathlib.Path("/proc/meminfo")
    if jax.default_backend() == "cpu" and meminfo.exists():
        (line,) = (x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        limit = int(line.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def table(rows: Sequence[Row]) -> str:
    """Makes a table of all rows."""
    header = ["step", "images per step", "image", "images/s", "megapixels/s", "memory, MB"]
    header += ["process, MB", "GB accessed per image"]
    lines = []
    for row in rows:
        step, batch_size, size = row["setting"].values()
        line = [step, str(batch_size), f"{size}×{size}"]
        if "ended" in row:
            lines.append([*line, f"**{row['ended'].removeprefix('  what():  ')}**", *[""] * 4])
            continue
        rate = batch_size / statistics.median(row["seconds"])
        line += [number(rate), number(rate * size**2 / 1e6, 3)]
        for name in ("memory_bytes", "peak_bytes"):
            line.append("" if row[name] is None else number(row[name] / 1e6))
        accessed = row["bytes_accessed"]
        lines.append([*line, "" if accessed is None else number(accessed / batch_size / 1e9, 3)])
    return markdown_table(header, lines)


_HEADER = """# Growth with the size of the images

    python benchmarks/growth.py --output=results/growth.json

This program wrote the page; do not edit it by hand. It runs FFHQ's network with `sparse_lattice`.
"metrics" is PSNR and SSIM; "encode" and "decode" are the codec's passes. "memory" is XLA's plan for
a step, "process" the most that the whole process held.
"""


def _report(rows: Sequence[Row], picture: str) -> str:
    sections = [_HEADER]
    for where, part in store.by_source(rows):
        sections.append(f"\n{where['machine']}; {where['versions']}\n\n{table(part)}\n")
    return "".join([*sections, f"\n![megapixels per second, and memory]({picture})\n"])


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Plots speed and memory against size on one machine: a column per batch, a line per step."""
    import matplotlib.pyplot as plt

    lines: dict[int, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["setting"]["size"]):
        step, batch_size, _ = row["setting"].values()
        if "ended" not in row:
            lines.setdefault(batch_size, {}).setdefault(step, []).append(row)
    grid: dict[str, Any] = {"sharex": True, "sharey": "row", "squeeze": False}
    figure, axes = plt.subplots(
        2, max(len(lines), 1), figsize=(11, 7), layout="constrained", **grid
    )
    for column, (batch_size, of_batch) in enumerate(sorted(lines.items())):
        speed, memory = axes[:, column]
        for step in STEPS:
            part = of_batch.get(step, [])
            sizes = [row["setting"]["size"] for row in part]
            megapixels = [batch_size * size**2 / 1e6 for size in sizes]
            seconds = [statistics.median(row["seconds"]) for row in part]
            speed.plot(sizes, np.divide(megapixels, seconds), marker="o", label=step)
            memory.plot(sizes, [row["peak_bytes"] / 1e9 for row in part], marker="o")
        speed.set(title=f"batch {batch_size}", xscale="log", yscale="log")
        memory.set(xlabel="height and width", yscale="log")
    axes[0, 0].set_ylabel("megapixels per second")
    axes[1, 0].set_ylabel("memory of the process, GB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = store.make_parser(PROGRAM, __doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    sizes = [28, 64, 128, 256, 512, 1024, 2048]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=int, default=300, help="the most that a process may take")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    if options.here:
        host_memory.keep_freed_memory()  # as main.py does
        _limit_memory()
        with one_line_exit(PROGRAM), naming_lack_of_memory():
            cases = options.steps[0], options.batch_sizes[0], options.sizes[0]
            print(json.dumps(run_once(*cases)))
        return
    with one_line_exit(PROGRAM):
        store.check_positive(options, "sizes", "batch_sizes", "seconds")
        picture = (options.output or pathlib.Path(PROGRAM)).with_suffix(".png")
        kept = store.Store(options.output, lambda rows: _report(rows, picture.name))
        where = store.source(PROGRAM, "jax", "flax")
        for step, batch_size in itertools.product(options.steps, options.batch_sizes):
            for size in sorted(options.sizes):
                setting = {"step": step, "batch": batch_size, "size": size}
                row = kept.find({**where, "setting": setting})
                if row is None or row.get("ended", "").startswith(_TOOK_LONG):
                    print(*setting.values(), file=sys.stderr, flush=True)
                    row = {**where, "setting": setting}
                    row |= run_apart(step, batch_size, size, options.seconds)
                    kept.add(row)
                    if options.output:
                        here = [other for other in kept.rows if other["machine"] == row["machine"]]
                        plot(here, picture)
                if "ended" in row:
                    break
        print(table(kept.rows))


if __name__ == "__main__":
    main()
