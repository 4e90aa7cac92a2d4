"""Comparisons of contenders that run in turns: measured, kept and shown in a table."""

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import measure, store
from benchmarks.measure import Case
from benchmarks.store import Row, number
from llvq.errors import UserError, first_line
from llvq.runtime.console import markdown_table

# Above this load average, other programs are at work. That distorts the comparison: with more
# threads than free cores, PyTorch was seen to take 90 times as long as with one thread.
_QUIET = 0.5

_HEADER = """# Benchmarks

The programs named below wrote this page and say what they measure; do not edit it by hand. Times
are medians of runs in turns; a ratio of speeds is the median of those of neighbouring runs, with
its quartiles in brackets.
"""


def comparison_table(rows: Sequence[Row]) -> str:
    """Makes a table with a line for each contender, with llvq's speed over its speed.

    Args:
      rows: as `record` makes them, of one benchmark.
    """
    ours = list(dict.fromkeys(name for row in rows for name in row["seconds"] if "llvq" in name))
    header = [*rows[0]["setting"], "program", "ms", f"{rows[0]['unit']}/s", "memory, MB"]
    with_shares = any(row.get("ceilings") for row in rows)
    header += ["of the memory's speed", "of the arithmetic's"] if with_shares else []
    header += [f"{name}'s speed / this one's" for name in ours]
    lines: list[list[str]] = []
    for row in rows:
        for name, seconds in row["seconds"].items():
            line = [*map(_cell, row["setting"].values()), name]
            if seconds is None:
                line.append("**does not fit**")
                lines.append(line + [""] * (len(header) - len(line)))
                continue
            median, memory = statistics.median(seconds), row["memory_bytes"].get(name)
            line += [number(1e3 * median, 3), number(row["amount"] / median)]
            line.append("" if memory is None else number(memory / 1e6))
            line += _shares(row, name, median) if with_shares else []
            line += [_ratio(row["seconds"], name, our) for our in ours]
            lines.append(line)
    return markdown_table(header, lines)


def _shares(row: Row, name: str, seconds: float) -> list[str]:
    """Returns the share of the memory's speed that a contender reaches, and of its arithmetic's."""
    work = dict(row.get("work", {}).get(name, {}))
    shares = {
        unit: f"{amount / seconds / row['ceilings'][unit]:.0%}" for unit, amount in work.items()
    }
    memory = shares.pop("memory", "")
    return [memory, next(iter(shares.values()), "")]


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ratio(seconds: Mapping[str, list[float] | None], theirs: str, ours: str) -> str:
    their_seconds, our_seconds = seconds[theirs], seconds.get(ours)
    if theirs == ours or not their_seconds or not our_seconds:
        return ""
    ratios = sorted(a / b for a, b in zip(their_seconds, our_seconds, strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} … {ratios[-1 - quarter]:.2f})"


def report(rows: Sequence[Row]) -> str:
    """Makes a page of all rows of `record`: a section for each command on each machine."""
    sections = [_HEADER]
    for where, part in store.by_source(rows):
        loads = [row["load"] for row in part if "load" in row]
        note = f"; load average before: {max(loads):.1f}" if loads else ""
        sections.append(
            f"\n## {where['program']}: {where['machine']}\n\n    {where['command']}\n\n"
            f"{where['versions']}{note}\n\n{comparison_table(part)}\n"
        )
    return "".join(sections)


def record(
    program: str,
    packages: Sequence[str],
    cases: Sequence[Case],
    unit: str,
    options: argparse.Namespace,
    between: Callable[[], None] = lambda: None,
    ceilings: Callable[[], Mapping[str, float]] = dict,
) -> None:
    """Measures all cases, prints a table of them, and keeps each as soon as it is measured.

    A case replaces the same case of the same program and machine that was kept before; with
    `--resume` it is not measured again.

    Args:
      program: e.g. "train_step.py".
      packages: whose versions matter.
      cases: what to measure.
      unit: of what a step handles, e.g. "images".
      options: of `make_parser`.
      between: called before each case.
      ceilings: measures what the device reaches; see `measure.ceilings`.

    Raises:
      UserError: if the output cannot be used, or memory is too small.
    """
    kept = store.Store(options.output, report)
    where = store.source(program, *packages)
    load = os.getloadavg()[0]
    if load > _QUIET and jax.default_backend() == "cpu":
        print(
            f"other programs keep {load:.1f} cores busy: on a CPU PyTorch's threads then wait for "
            "each other, and the ratios flatter llvq",
            file=sys.stderr,
        )
    if options.resume:
        cases = [case for case in cases if not kept.find({**where, "setting": case.setting})]
    reached = dict(ceilings()) if cases else {}
    measured: list[Row] = []
    for case in store.progress(cases, lambda case: store.words(case.setting)):
        between()
        try:
            seconds, ran = measure.compare(case.contenders, options.repeats, options.min_seconds)
        except (MemoryError, RuntimeError) as error:
            if not measure.lacks_memory(error):
                raise
            raise UserError(
                f"not enough memory to run the contenders in turns ({first_line(error):.150}): "
                "choose smaller sizes"
            ) from error
        row = {**where, "setting": case.setting, "unit": unit, "amount": case.amount}
        row |= {"load": load, "seconds": seconds, "ceilings": reached}
        row["memory_bytes"] = {name: contender.memory_bytes for name, contender in ran.items()}
        row["work"] = {name: dict(contender.work) for name, contender in ran.items()}
        measured.append(row)
        kept.add(row)
    print(comparison_table(measured) if measured else "every case has been measured before")


def make_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the options that `record` needs."""
    parser = store.make_parser(program, doc)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each contender")
    parser.add_argument(
        "--min-seconds", type=float, default=0.2, help="a run has as many calls as fill this time"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has of this machine"
    )
    return parser


def check_options(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless the options of `make_parser`, and those named, can be used."""
    store.Store(options.output, report)
    store.check_positive(options, "repeats", *names)
    if not options.min_seconds >= 0:
        raise UserError(f"--min-seconds: {options.min_seconds} must be 0 or more")


def require_torch() -> None:
    """Raises UserError unless PyTorch is installed and runs where JAX does."""
    if importlib.util.find_spec("torch") is None:
        raise UserError('PyTorch is not installed: pip install "torch>=2.6"')
    import torch

    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        raise UserError(f"JAX runs on {backend}, PyTorch does not: give JAX_PLATFORMS=cpu")
    if backend == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on a GPU that PyTorch {torch.__version__} does not find: install PyTorch "
            "for CUDA, or give JAX_PLATFORMS=cpu"
        )
