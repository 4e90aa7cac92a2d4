"""What the benchmarks share: runs in turns, memory, and figures that are kept with their table.

A contender is prepared once and then run, in turns with the others: the n-th times of all are
neighbours, and a ratio is the median of the ratios of neighbours. So what slows down the machine
for a while slows them all.
"""

import gc
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from llvq.errors import UserError, first_line
from llvq.runtime import sharding

Run = Callable[[int], None]
"""Makes so many calls, of a step each as a rule, and returns when the last one is done."""

Row = dict[str, Any]


class Contender(NamedTuple):
    """Attributes:
    run: see `Run`; what compiles or tunes itself has done so.
    memory_bytes: of a call, parameters, optimizer and inputs included; None if unknown.
    steps_per_call: how many steps a call takes.
    """

    run: Run
    memory_bytes: int | None
    steps_per_call: int = 1


class Case(NamedTuple):
    """Attributes:
    setting: what tells it from others, a column of the table each.
    amount: what a step handles, e.g. how many images.
    contenders: by name; with those that have "llvq" in theirs all others are compared.
    """

    setting: dict[str, Any]
    amount: int
    contenders: dict[str, Callable[[], Contender]]


# Threads of the library that ran before may go on spinning for some milliseconds.
_PAUSE_SECONDS = 0.02


# A load average above this is other programs', and is warned of: with more threads than free cores
# PyTorch was seen to take 90 times as long as with one.
_QUIET = 0.5


def interleave(
    runs: Mapping[str, Run], repeats: int, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds that a call of each takes, `repeats` times in turns.

    Args:
      runs: what has run before, by name.
      repeats: how often each is timed.
      min_seconds: a timed run has as many calls as fill that time.
    """

    def seconds(run: Run, num_calls: int) -> float:
        time.sleep(_PAUSE_SECONDS)
        start = time.perf_counter()
        run(num_calls)
        return (time.perf_counter() - start) / num_calls

    num_calls = dict.fromkeys(runs, 1)
    if min_seconds:
        num_calls = {name: math.ceil(min_seconds / seconds(run, 1)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        # Nobody always comes after the same one.
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            times[name].append(seconds(runs[name], num_calls[name]))
    return times


def compare(
    contenders: Mapping[str, Callable[[], Contender]], repeats: int, min_seconds: float
) -> tuple[dict[str, list[float] | None], dict[str, int | None]]:
    """(seconds a step, bytes) of each contender; None for seconds where memory does not suffice."""
    prepared: dict[str, Contender] = {}
    for name, prepare in contenders.items():
        try:
            prepared[name] = prepare()
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
        gc.collect()  # what a failed attempt has left
    runs = {name: contender.run for name, contender in prepared.items()}
    times = {
        name: [seconds / prepared[name].steps_per_call for seconds in of_calls]
        for name, of_calls in interleave(runs, repeats, min_seconds).items()
    }
    memory = {name: contender.memory_bytes for name, contender in prepared.items()}
    return {name: times.get(name) for name in contenders}, memory


def _lacks_memory(error: BaseException) -> bool:
    text = str(error).lower()
    signs = ("out of memory", "resource_exhausted", "allocate memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def compiled_memory(compiled: jax.stages.Compiled) -> int:
    """Bytes that XLA has planned for a call: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def torch_memory(run: Run, tensors: Iterable[Any]) -> int:
    """The same of PyTorch: tensors that stay, and the most that a step allocates besides.

    Neither account has what libraries take by other ways, such as oneDNN's scratch memory.
    """
    import torch

    stays = list(tensors)
    total = sum(tensor.numel() * tensor.element_size() for tensor in stays)
    if stays[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return total + torch.cuda.max_memory_allocated() - before
    # On a CPU the allocator only counts while it is profiled.
    with torch.profiler.profile(profile_memory=True) as profile:
        run(1)
    with tempfile.TemporaryDirectory() as directory:
        trace = pathlib.Path(directory) / "trace.json"
        profile.export_chrome_trace(os.fspath(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return total + max(sizes, default=0)


def machine() -> str:
    """In words, e.g. "1 × NVIDIA H100 80GB HBM3" or "2 CPU cores (AMD EPYC 7B13)"."""
    words = sharding.describe(sharding.make_mesh(jax.devices()[:1]))
    if jax.default_backend() != "cpu":
        return words
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{words} ({names[0] if names else platform.machine()})"


def versions(*packages: str) -> str:
    """Of Python and installed packages."""
    found = (f"{package} {metadata.version(package)}" for package in packages)
    return ", ".join((f"Python {platform.python_version()}", *found))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join((lines[0], "|---" * len(header) + "|", *lines[1:]))


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} … {ratios[-1 - quarter]:.2f})"


def comparison_table(rows: Sequence[Row]) -> str:
    """A line for each contender of each row, with llvq's speed over its speed.

    Args:
      rows: as `record` makes them, of one benchmark.
    """
    ours = list(dict.fromkeys(name for row in rows for name in row["seconds"] if "llvq" in name))
    unit = rows[0]["unit"]
    header = (
        *(*rows[0]["setting"], "program", "ms", f"{unit}/s", "memory, MB"),
        *(f"{name} is faster by" for name in ours),
    )
    lines: list[list[str]] = []
    for row in rows:
        all_seconds = row["seconds"]
        for name, seconds in all_seconds.items():
            line = [*map(_cell, row["setting"].values()), name]
            if seconds is None:
                lines.append([*line, "**does not fit**", *[""] * (2 + len(ours))])
                continue
            median, memory = statistics.median(seconds), row["memory_bytes"].get(name)
            line += [f"{1e3 * median:.3g}", f"{row['amount'] / median:,.4g}"]
            line.append("" if memory is None else f"{memory / 1e6:,.4g}")
            line += [
                _ratio(seconds, all_seconds[our]) if our != name and all_seconds.get(our) else ""
                for our in ours
            ]
            lines.append(line)
    return table(header, lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def read_rows(output: pathlib.Path, check: Callable[[list[Row]], Any]) -> list[Row]:
    """What earlier runs have kept in a JSON file, if anything.

    Raises:
      UserError: if a run could not keep anything there, or `check` raises what says that the rows
        are not of the kind expected.
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
    """Keeps rows in a JSON file, at no moment half of them, and Markdown beside it.

    Raises:
      UserError: if they cannot be written.
    """
    unfinished = output.with_suffix(".unfinished")
    try:
        unfinished.write_text(json.dumps(rows, indent=1) + "\n")
        unfinished.replace(output)
        output.with_suffix(".md").write_text(markdown)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UserError(f"--output={output} cannot be written: {reason}") from error


_HEADER = """# llvq and PyTorch side by side

Written by the programs named below, which say what they measure; not to be edited by hand. Times
are medians of runs in turns; "faster by" is the median of the ratios of neighbouring runs, in
brackets their quartiles.
"""
_SOURCE = ("program", "machine", "versions", "command")


def report(rows: Sequence[Row]) -> str:
    """All rows in Markdown, a section for each command on each machine."""
    by_source: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_source.setdefault(tuple(row[name] for name in _SOURCE), []).append(row)
    sections = (
        f"\n## {program}: {machine}\n\n    {command}\n\n{versions}; load average before: "
        f"{max(row['load'] for row in part):.1f}\n\n{comparison_table(part)}\n"
        for (program, machine, versions, command), part in by_source.items()
    )
    return _HEADER + "".join(sections)


def record(
    program: str,
    packages: Sequence[str],
    cases: Sequence[Case],
    unit: str,
    options: Any,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Runs a benchmark: measures all cases, prints them as a table, and keeps them as they come.

    A case that was kept before, of the same program and machine, is replaced.

    Args:
      program: e.g. "train_step.py".
      packages: whose versions matter.
      cases: what to measure.
      unit: of what a step handles, e.g. "images".
      options: with `repeats`, `min_seconds` and `output`, a JSON file or None.
      between: to be called before each case.

    Raises:
      UserError: if the output cannot be used, or memory does not suffice.
    """
    kept = read_rows(options.output, report) if options.output else []
    source = (program, machine(), versions(*packages), " ".join(["python", *sys.argv]))
    load = os.getloadavg()[0]
    if load > _QUIET and jax.default_backend() == "cpu":
        print(
            f"other programs keep {load:.1f} cores busy: on a CPU PyTorch's threads then wait for "
            "each other, and the ratios flatter llvq",
            file=sys.stderr,
        )
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
            seconds, memory = compare(case.contenders, options.repeats, options.min_seconds)
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            raise UserError(
                f"not enough memory to run the contenders in turns ({first_line(error):.150}): "
                "choose smaller sizes"
            ) from error
        row: Row = {
            **dict(zip(_SOURCE, source, strict=True)),
            **{"setting": case.setting, "unit": unit, "amount": case.amount},
            **{"load": load, "seconds": seconds, "memory_bytes": memory},
        }
        measured.append(row)
        kept = [old for old in kept if _identity(old) != _identity(row)] + [row]
        if options.output:
            write_rows(options.output, kept, report(kept))
    print(comparison_table(measured))


def _identity(row: Row) -> tuple[Any, ...]:
    return row["program"], row["machine"], row["setting"]
