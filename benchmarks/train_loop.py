"""What the loop around the training steps costs, by JAX's profiler.

    python benchmarks/train_loop.py [--datasets fashion_mnist celeba] [--num-steps=64] \
        [--output=results/train_loop.json] [--trace-dir=/tmp/train_loop]

Trains as main.py does on a CPU, a call for each step, from files in the official layouts (see
input_pipeline.py) to checkpoints and TensorBoard, and traces the steps after the first ones. A gap
is the time from the end of one step's program to the start of the next one's; while it lasts the
device has no step to take: waiting for input, copying images, logging and saving all end up in it.
Logs and checkpoints come more often here than in the config, so that there are several; the loop's
cost is reckoned with the config's intervals. Validation is left out.

What the host does during a log or a checkpoint while the device is at work costs nothing, but a
checkpoint is written in the background: where cores are few, as on a CPU, the steps meanwhile take
longer, which counts as well. Where a checkpoint takes longer to write than there are steps to the
next one here, its share comes out too high. On a CPU, of which JAX must see one device, the batches
are train_step.py's; traces of GPUs cannot be read yet.

--output keeps the figures, a table beside it in Markdown, and for each data set a picture of the
trace around a checkpoint; what it has of other data sets and machines stays. --trace-dir keeps the
traces themselves, for https://ui.perfetto.dev (*.trace.json.gz) or TensorBoard.
"""

import argparse
import bisect
import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax

from benchmarks import measure
from benchmarks.input_pipeline import KINDS, Kind, open_pipeline, write_files
from benchmarks.measure import Row
from benchmarks.train_step import DATASETS, ON_CPU, get_config
from llvq.data import Dataset, Images
from llvq.data.order import IndexBatch
from llvq.errors import UserError
from llvq.runtime import console, host_memory
from llvq.train import train_and_evaluate

_FIRST_TRACED = 4  # what compiles and what fills buffers is over by then
_LOG_EVERY, _SAVE_EVERY = 6, 20
_SLOWED = 4  # steps that a checkpoint may still be written during
_TIMES = ("step", "gap", "gap_after_log", "gap_after_checkpoint", "slower_steps_after_checkpoint")
_HOST = ("input", "to_devices", "train", "measure_batch", "save")


class Span(NamedTuple):
    """Something that took time: from when to when, in seconds of one clock."""

    start: float
    end: float


class Trace(NamedTuple):
    """Attributes:
    steps: the programs of the training steps, by the step's number.
    others: the device's other programs.
    host: what the host did, by name.
    """

    steps: dict[int, Span]
    others: list[Span]
    host: dict[str, list[Span]]


class _Annotated:
    """A data set whose reading of batches shows in the trace."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self.num_images, self.image_shape = data.num_images, data.image_shape

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        batches = self._data.batches(split, index_batches)
        while True:
            with jax.profiler.TraceAnnotation("input"):
                item = next(batches, None)
            if item is None:
                return
            yield item

    def resident(self, split: str) -> Images | None:
        return self._data.resident(split)


def record(kind: Kind, num_steps: int, directory: pathlib.Path, trace_dir: pathlib.Path) -> None:
    """Trains in a directory, and leaves the trace in another."""
    from clu import metric_writers

    config = get_config(kind.module, "sparse_lattice")
    config.batch_size = kind.batch_size
    config.num_train_steps = num_steps
    config.steps_per_call = 1  # steps are what is looked for in the trace
    config.log_every_steps, config.checkpoint_every_steps = _LOG_EVERY, _SAVE_EVERY
    config.eval_every_steps = num_steps
    workdir = directory / "workdir"

    def make_writer() -> Any:
        writers = [console.ConsoleWriter(), metric_writers.SummaryWriter(os.fspath(workdir))]
        return metric_writers.AsyncMultiWriter(writers)

    options: Any = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function otherwise: that costs, too

    def make_progress(total: int) -> Callable[[int], Any]:
        def report(step: int) -> None:
            if total == num_steps and step == _FIRST_TRACED:
                jax.profiler.start_trace(os.fspath(trace_dir), profiler_options=options)
            if total == num_steps and step == num_steps - 1:
                jax.profiler.stop_trace()

        return report

    files = directory / "files"
    files.mkdir()
    if kind.encoding:
        write_files(kind, files)
    data = _Annotated(open_pipeline(kind, files))
    try:
        train_and_evaluate(config, workdir, data, make_writer=make_writer, progress=make_progress)
    finally:
        with contextlib.suppress(RuntimeError):  # it has been stopped
            jax.profiler.stop_trace()


def read(trace_dir: pathlib.Path) -> Trace:
    """The newest trace that `record` left.

    Raises:
      UserError: if programs of the steps that it knows of are not in it.
    """
    *_, path = sorted(trace_dir.glob("**/*.xplane.pb"))
    programs: list[tuple[Span, str]] = []
    host: dict[str, list[Span]] = {name: [] for name in _HOST}
    called: list[tuple[int, Span]] = []
    is_of_step: list[float] = []
    for plane in jax.profiler.ProfileData.from_file(os.fspath(path)).planes:
        for line in plane.lines:
            for event in line.events:
                span = Span(event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9)
                if plane.name.startswith("/device:"):
                    if line.name == "XLA Modules" and plane.name.endswith(":0"):
                        programs.append((span, event.name))
                elif "PjRtCpuClient" in line.name and "wait for completion" in event.name:
                    programs.append((span, ""))
                elif event.name in host:
                    host[event.name].append(span)
                    if event.name == "train":
                        called.append((int(dict(event.stats)["step_num"]), span))
                elif dict(event.stats).get("hlo_module") == "jit_train_step":
                    is_of_step.append(span.start)
    is_of_step.sort()

    def is_step(span: Span, name: str) -> bool:
        if name:
            return name.startswith("jit_train_step")
        place = bisect.bisect_left(is_of_step, span.start)
        return place < len(is_of_step) and is_of_step[place] < span.end

    runs = sorted(span for span, name in programs if is_step(span, name))
    others = sorted(span for span, name in programs if not is_step(span, name))
    # A step's program is the first one to end after it was called for, once the one before has.
    steps: dict[int, Span] = {}
    for number, call in sorted(called):
        later = [run for run in runs if run.end > call.start and run not in steps.values()]
        if later:
            steps[number] = later[0]
    if len(steps) < len(called) - 1:  # the last one may not have ended
        raise UserError(f"{path}: of {len(called)} steps it has the programs of {len(steps)}")
    return Trace(steps, others, host)


def figures(trace: Trace, log_every: int, save_every: int) -> dict[str, float]:
    """Of a step and of the gaps after it, in seconds, and the loop's share of the time.

    Medians, but for the steps that a checkpoint slows down: all of them together, on average.
    """
    steps = trace.steps
    seconds = {number: run.end - run.start for number, run in steps.items()}
    gaps = {
        number: max(steps[number + 1].start - run.end, 0.0)
        for number, run in steps.items()
        if number + 1 in steps
    }

    def median(which: Callable[[int], bool], values: dict[int, float]) -> float:
        return statistics.median([value for number, value in values.items() if which(number)])

    def is_log(number: int) -> bool:
        return number % _LOG_EVERY == 0 and number % _SAVE_EVERY > 0

    def is_save(number: int) -> bool:
        return number % _SAVE_EVERY == 0

    step = median(lambda number: number % _SAVE_EVERY > _SLOWED, seconds)
    ordinary = median(lambda number: not is_log(number) and not is_save(number), gaps)
    log, save = median(is_log, gaps), median(is_save, gaps)
    slowed = [
        seconds[number + n] - step
        for number in seconds
        if is_save(number)
        for n in range(1, _SLOWED + 1)
        if number + n in seconds
    ]
    slower = max(statistics.mean(slowed), 0.0) * _SLOWED
    # A log's gap includes an ordinary one; so a checkpoint's, which includes a log's.
    loop = ordinary + (log - ordinary) / log_every + (save - ordinary + slower) / save_every
    return {
        "step": step,
        "gap": ordinary,
        "gap_after_log": log,
        "gap_after_checkpoint": save,
        "slower_steps_after_checkpoint": slower,
        "share": loop / (step + loop),
    }


def draw(trace: Trace, title: str, path: pathlib.Path) -> None:
    """The trace around a checkpoint, as a picture."""
    import matplotlib.pyplot as plt

    saves = [number for number in trace.steps if number % _SAVE_EVERY == 0]
    first, last = saves[0] - 3, saves[0] + 4
    start, end = trace.steps[first].start, trace.steps[last].end
    lanes = {"device: training step": list(trace.steps.values()), "device: other": trace.others}
    lanes |= {f"host: {name}": trace.host[name] for name in _HOST}
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for height, (name, spans) in enumerate(lanes.items()):
        shown = [span for span in spans if span.end > start and span.start < end]
        bars = [(1e3 * (s.start - start), 1e3 * max(s.end - s.start, 1e-5)) for s in shown]
        color = "tab:blue" if name.startswith("device") else "tab:orange"
        axes.broken_barh(bars, (height - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * (end - start))
    axes.set_xlabel("ms")
    axes.set_title(f"{title}: steps {first} to {last}, a checkpoint after {saves[0]}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown."""
    header = (
        *("data set", "batch", "step, ms", "gap, ms", "after a log, ms", "logs every"),
        *("after a checkpoint, ms", "steps after it longer by, ms", "checkpoints every"),
        "loop's share",
    )
    lines = []
    for row in rows:
        ms = {name: f"{1e3 * row[name]:.2f}" for name in _TIMES}
        cells = [row["dataset"], row["batch_size"], ms["step"], ms["gap"]]
        cells += [ms["gap_after_log"], row["log_every_steps"], ms["gap_after_checkpoint"]]
        cells += [ms["slower_steps_after_checkpoint"], row["checkpoint_every_steps"]]
        lines.append([*map(str, cells), f"{row['share']:.2%}"])
    return measure.table(header, lines)


_HEADER = """# What the loop around the training steps costs

Written by benchmarks/train_loop.py, which says what is measured; not to be edited by hand.
"""


def _report(rows: Sequence[Row]) -> str:
    by_source: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        source = row["command"], row["machine"], row["versions"]
        by_source.setdefault(source, []).append(row)
    return _HEADER + "".join(
        f"\n    {command}\n\n{machine}; {versions}\n\n{table(part)}\n"
        for (command, machine, versions), part in by_source.items()
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    title, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="train_loop.py", description=title)
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--datasets",
        nargs="+",
        choices=DATASETS,
        default=["fashion_mnist", "celeba"] if on_cpu else list(DATASETS),
    )
    parser.add_argument("--num-steps", type=int, default=3 * _SAVE_EVERY + 4)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the figures in")
    parser.add_argument("--trace-dir", type=pathlib.Path, help="where to leave the traces")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    try:
        fewest = _SAVE_EVERY + _SLOWED + 2
        if options.num_steps < fewest:
            raise UserError(f"--num-steps={options.num_steps}: must be at least {fewest}")
        backend, num_devices = jax.default_backend(), jax.device_count()
        if backend == "gpu" or (backend == "cpu" and num_devices > 1):
            raise UserError(f"it cannot read traces of {num_devices} devices of kind {backend}")
        kept = measure.read_rows(options.output, _report) if options.output else []
        rows: list[Row] = []
        for name in options.datasets:
            kind = next(kind for kind in KINDS if kind.module == name)
            batch_size = ON_CPU[name][0] if jax.default_backend() == "cpu" else kind.batch_size
            kind = dataclasses.replace(
                kind, batch_size=batch_size, num_images=batch_size * options.num_steps
            )
            print(name, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="train_loop_") as temporary:
                directory = pathlib.Path(temporary)
                trace_dir = (options.trace_dir or directory / "trace") / name
                record(kind, options.num_steps, directory, trace_dir)
                trace = read(trace_dir)
            config = get_config(name, "sparse_lattice")
            every = config.log_every_steps, config.checkpoint_every_steps
            row: Row = {"dataset": name, "batch_size": batch_size, **figures(trace, *every)}
            row |= {"log_every_steps": every[0], "checkpoint_every_steps": every[1]}
            row |= {"machine": measure.machine(), "versions": measure.versions("jax", "flax")}
            rows.append({**row, "command": " ".join(["python", *sys.argv])})
            if options.output:
                same = name, rows[-1]["machine"]
                kept = [old for old in kept if (old["dataset"], old["machine"]) != same]
                kept.append(rows[-1])
                path = options.output.with_name(f"{options.output.stem}_{name}.png")
                draw(trace, f"{name}, {measure.machine()}", path)
                measure.write_rows(options.output, kept, _report(kept))
    except UserError as error:
        sys.exit(f"train_loop.py: {error}")
    print(table(rows))


if __name__ == "__main__":
    main()
