"""Keeps the benchmarks' figures in a JSON file, and writes tables of them."""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks import measure
from benchmarks.measure import Case
from llvq.data.files import replacing
from llvq.errors import UserError, first_line
from llvq.runtime.console import markdown_table

Row = dict[str, Any]

# Above this load average, other programs are at work. That distorts the comparison: with more
# threads than free cores, PyTorch was seen to take 90 times as long as with one thread.
_QUIET = 0.5

_HEADER = """# Benchmarks

The programs named below wrote this page and say what they measure; do not edit it by hand. Times
are medians of runs in turns; a ratio of speeds is the median of those of neighbouring runs, with
its quartiles in brackets.
"""
_SOURCE = ("program", "machine", "versions", "command")


def read_rows(output: pathlib.Path, check: Callable[[list[Row]], Any]) -> list[Row]:
    """The rows that earlier runs have kept in a JSON file, if any.

    Args:
      output: the file.
      check: raises an exception if the rows are of another kind.

    Raises:
      UserError: if the file cannot be used.
    """
    if output.suffix != ".json":
        raise UserError(f"--output={output}: must end in .json; a table is written beside it")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no directory {output.parent}")
    if not output.exists():
        return []
    try:
        rows = json.loads(output.read_text())
        check(rows)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"--output={output} exists and is not of this program") from error
    except OSError as error:
        raise UserError(f"--output={output} cannot be read: {error.strerror or error}") from error
    return rows


def write_rows(output: pathlib.Path, rows: Sequence[Row], markdown: str) -> None:
    """Keeps rows in a JSON file, which is replaced as a whole, and Markdown beside it.

    Raises:
      UserError: if they cannot be written.
    """
    try:
        with replacing(output) as file:
            file.write_text(json.dumps(rows, indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output={output} cannot be written: {reason}") from error


def source(program: str, *packages: str) -> Row:
    """Where the figures of this process come from: the entries that `by_source` groups rows by.

    Args:
      program: e.g. "train_step.py".
      packages: whose versions matter.
    """
    command = " ".join(["python", *sys.argv])
    values = program, measure.machine(), measure.versions(*packages), command
    return dict(zip(_SOURCE, values, strict=True))


def by_source(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """(source, rows) of each command on each machine, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SOURCE), []).append(row)
    for values, group in groups.items():
        yield dict(zip(_SOURCE, values, strict=True)), group


def comparison_table(rows: Sequence[Row]) -> str:
    """A line for each contender of each row, with llvq's speed over its speed.

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


def number(value: float, digits: int = 4) -> str:
    """A number with so many digits, and commas instead of an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def _shares(row: Row, name: str, seconds: float) -> list[str]:
    """What a contender reaches of the memory's speed, and of that of its arithmetic."""
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
    """All rows of `record` in Markdown, with a section for each command on each machine."""
    sections = [_HEADER]
    for where, part in by_source(rows):
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
    """Runs a benchmark: measures all cases, prints them as a table, and keeps them as they come.

    A case replaces the same case of the same program and machine that was kept before; with
    `--resume` it is not measured again.

    Args:
      program: e.g. "train_step.py".
      packages: whose versions matter.
      cases: what to measure.
      unit: of what a step handles, e.g. "images".
      options: of `add_options`.
      between: is called before each case.
      ceilings: measures what the device reaches; see `measure.ceilings`.

    Raises:
      UserError: if the output cannot be used, or memory is too small.
    """
    rows = read_rows(options.output, report) if options.output else []
    where = source(program, *packages)
    load = os.getloadavg()[0]
    if load > _QUIET and jax.default_backend() == "cpu":
        print(
            f"other programs keep {load:.1f} cores busy: on a CPU PyTorch's threads then wait for "
            "each other, and the ratios flatter llvq",
            file=sys.stderr,
        )
    if options.resume:
        cases = [case for case in cases if kept({**where, "setting": case.setting}, rows) is None]
    reached = dict(ceilings()) if cases else {}
    measured: list[Row] = []
    start = time.monotonic()
    for number, case in enumerate(cases):
        left = (time.monotonic() - start) / number * (len(cases) - number) if number else None
        eta = "" if left is None else f", {left / 60:.0f} min left"
        print(
            f"{number + 1}/{len(cases)}{eta}:", *case.setting.values(), file=sys.stderr, flush=True
        )
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
        rows = keep(rows, row, options.output)
    print(comparison_table(measured) if measured else "every case has been measured before")


def keep(rows: Sequence[Row], row: Row, output: pathlib.Path | None) -> list[Row]:
    """As `replaced`; also writes the rows, if there is a file."""
    rows = replaced(rows, row)
    if output:
        write_rows(output, rows, report(rows))
    return rows


def replaced(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows, with a new one in place of that of the same case, program and machine."""
    return [*(old for old in rows if _identity(old) != _identity(row)), row]


def kept(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the same case, program and machine; None if there is none."""
    return next((old for old in rows if _identity(old) == _identity(row)), None)


def _identity(row: Row) -> tuple[Any, ...]:
    return row["program"], row["machine"], row["setting"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `record` needs."""
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each contender")
    parser.add_argument(
        "--min-seconds", type=float, default=0.2, help="a run has as many calls as fill this time"
    )
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the figures in")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has of this machine"
    )


def check_options(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless the options of these names, and the repeats, are above 0."""
    for name in ("repeats", *names):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
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
