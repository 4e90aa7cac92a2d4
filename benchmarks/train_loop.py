"""The cost of the loop around the training steps, by JAX's profiler.

    python benchmarks/train_loop.py [--datasets fashion_mnist celeba] [--num-steps=64] \
        [--output=results/train_loop.json] [--trace-dir=/tmp/train_loop]

Trains as main.py does on a CPU, with one step per call, from files in the official layouts (see
input_pipeline.py) to checkpoints and TensorBoard, and traces all steps but the first ones. A gap is
the time from the end of one step's program to the start of the next one's. While it lasts the
device has no step to take: waiting for input, copying images, logging and saving all count. Logs
and checkpoints come more often here than in the config, so that there are several of them; the cost
of the loop is computed with the config's intervals. Validation is left out.

Logging and saving cost nothing while the device is at work. But a checkpoint is written in the
background, and on few cores the steps meanwhile take longer, which counts as well. If writing a
checkpoint takes longer than the steps up to the next one here, its share comes out too high. JAX
must see one CPU device; the batches are those of train_step.py. Traces of GPUs cannot be read yet.

--output keeps the numbers, and a table beside them in Markdown; those of other data sets and
machines stay. --trace-dir keeps the traces for https://ui.perfetto.dev (*.trace.json.gz) or
TensorBoard, which show what the host does in the gaps.
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

from benchmarks import store
from benchmarks.input_pipeline import KINDS, Kind, open_pipeline, write_files
from benchmarks.settings import get_config
from benchmarks.store import Row
from benchmarks.train_step import default_sizes
from llvq.data import Dataset, Images, IndexBatch
from llvq.errors import UserError, one_line_exit
from llvq.runtime import host_memory
from llvq.runtime.background import BackgroundWriter
from llvq.runtime.console import markdown_table
from llvq.train import train_and_evaluate

DATASETS = {kind.module: kind for kind in reversed(KINDS)}

_QUANTIZER = "sparse_lattice"
_FIRST_TRACED = 5  # by then everything is compiled and all buffers are full
_LOG_EVERY, _SAVE_EVERY = 6, 20
_SLOWED = 4  # how many steps may run while a checkpoint is written
_TIMES = {
    "step": "step, ms",
    "gap": "gap, ms",
    "gap_after_log": "after a log, ms",
    "gap_after_checkpoint": "after a checkpoint, ms",
    "slower_steps_after_checkpoint": "extra time of the steps after a checkpoint, ms",
}


class Span(NamedTuple):
    """A period of time: from when to when, in seconds of one clock."""

    start: float
    end: float


class _Traced:
    """A data set that starts the profiler when a training step reads its batch, and stops it."""

    def __init__(self, data: Dataset, num_steps: int, trace_dir: pathlib.Path) -> None:
        self._data, self._num_steps, self._trace_dir = data, num_steps, trace_dir
        self.num_images, self.image_shape = data.num_images, data.image_shape
        self.fingerprint = data.fingerprint

    def batches(
        self, split: str, index_batches: Iterable[IndexBatch]
    ) -> Iterator[tuple[IndexBatch, Images]]:
        for step, item in enumerate(self._data.batches(split, index_batches), start=1):
            if split == "train" and step == _FIRST_TRACED:
                options: Any = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # tracing every call of a function costs time
                jax.profiler.start_trace(os.fspath(self._trace_dir), profiler_options=options)
            if split == "train" and step == self._num_steps:
                jax.profiler.stop_trace()
            yield item

    def resident(self, split: str) -> Images | None:
        return self._data.resident(split)


def record(kind: Kind, num_steps: int, directory: pathlib.Path, trace_dir: pathlib.Path) -> None:
    """Trains in a directory, and leaves the trace in another."""
    from clu import metric_writers

    config = dataclasses.replace(
        get_config(kind.module, _QUANTIZER, batch_size=kind.batch_size),
        num_train_steps=num_steps,
        log_every_steps=_LOG_EVERY,
        checkpoint_every_steps=_SAVE_EVERY,
        eval_every_steps=num_steps,
    )
    workdir = directory / "workdir"

    def make_writer() -> Any:
        return BackgroundWriter(lambda: metric_writers.SummaryWriter(os.fspath(workdir)))

    files = directory / "files"
    files.mkdir()
    if kind.encoding:
        write_files(kind, files)
    data = _Traced(open_pipeline(kind, files), num_steps, trace_dir)
    try:
        train_and_evaluate(config, workdir, data, make_writer=make_writer)
    finally:
        with contextlib.suppress(RuntimeError):  # it has been stopped already
            jax.profiler.stop_trace()


def read(trace_dir: pathlib.Path) -> dict[int, Span]:
    """Finds the programs of the training steps, by the step's number, in `record`'s newest trace.

    Raises:
      UserError: if programs of steps that the trace knows of are missing.
    """
    *_, path = sorted(trace_dir.glob("**/*.xplane.pb"))
    programs: list[Span] = []
    called: list[tuple[int, float]] = []
    operations: list[float] = []  # when those of training steps start
    for plane in jax.profiler.ProfileData.from_file(os.fspath(path)).planes:
        for line in plane.lines:
            for event in line.events:
                start = event.start_ns / 1e9
                if "PjRtCpuClient" in line.name and "wait for completion" in event.name:
                    programs.append(Span(start, start + event.duration_ns / 1e9))
                elif event.name == "train":
                    called.append((int(dict(event.stats)["step_num"]), start))
                elif dict(event.stats).get("hlo_module") == "jit_train_step":
                    operations.append(start)
    operations.sort()

    def is_step(program: Span) -> bool:
        place = bisect.bisect_left(operations, program.start)
        return place < len(operations) and operations[place] < program.end

    remaining = sorted(filter(is_step, programs))
    steps: dict[int, Span] = {}
    # A step's program is the first one, after that of the step before, to end after its call.
    for number, start in sorted(called):
        remaining = [program for program in remaining if program.end > start]
        if remaining:
            steps[number] = remaining.pop(0)
    if len(steps) < len(called) - 1:  # the last one may not have ended
        raise UserError(f"{path}: of {len(called)} steps it has the programs of {len(steps)}")
    return steps


def summarise(steps: dict[int, Span], log_every: int, save_every: int) -> dict[str, float]:
    """Computes the seconds of a step and of the gaps after it, and the loop's share of the time.

    All are medians, except that the steps that a checkpoint slows down are averaged.

    Args:
      steps: as `read` returns them.
      log_every: the interval of logs for which the share is computed.
      save_every: the same for checkpoints.
    """
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
    # A log's gap includes an ordinary one; so does a checkpoint's, which also includes a log's.
    loop = ordinary + (log - ordinary) / log_every + (save - ordinary + slower) / save_every
    times = dict(zip(_TIMES, (step, ordinary, log, save, slower), strict=True))
    return {**times, "share": loop / (step + loop)}


def table(rows: Sequence[Row]) -> str:
    """Makes a table of all rows."""
    header = ["data set", "batch", *_TIMES.values()]
    header += ["logs every", "checkpoints every", "loop's share"]
    lines = []
    for row in rows:
        line = [row["dataset"], str(row["batch_size"])]
        line += [f"{1e3 * row[name]:.2f}" for name in _TIMES]
        line += [str(row["log_every_steps"]), str(row["checkpoint_every_steps"])]
        lines.append([*line, f"{row['share']:.2%}"])
    return markdown_table(header, lines)


_HEADER = """# What the loop around the training steps costs

benchmarks/train_loop.py wrote this page and says what is measured; do not edit it by hand.
"""


def _report(rows: Sequence[Row]) -> str:
    return _HEADER + "".join(
        f"\n    {where['command']}\n\n{where['machine']}; {where['versions']}\n\n{table(part)}\n"
        for where, part in store.by_source(rows)
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = store.make_parser("train_loop.py", __doc__)
    default = ["fashion_mnist", "celeba"]
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=default)
    parser.add_argument("--num-steps", type=int, default=3 * _SAVE_EVERY + 4)
    parser.add_argument("--trace-dir", type=pathlib.Path, help="where to leave the traces")
    return parser.parse_args(arguments)


def _measure(dataset: str, num_steps: int, trace_dir: pathlib.Path | None) -> Row:
    config = get_config(dataset, _QUANTIZER)
    batch_size, _ = default_sizes(config)
    kind = dataclasses.replace(
        DATASETS[dataset], batch_size=batch_size, num_images=batch_size * num_steps
    )
    with tempfile.TemporaryDirectory(prefix="train_loop_") as temporary:
        directory = pathlib.Path(temporary)
        traces = (trace_dir or directory / "trace") / dataset
        record(kind, num_steps, directory, traces)
        steps = read(traces)
    log_every, save_every = config.log_every_steps, config.checkpoint_every_steps
    row: Row = {**store.source("train_loop.py", "jax", "flax"), "dataset": dataset}
    row |= {"batch_size": batch_size, **summarise(steps, log_every, save_every)}
    return {**row, "log_every_steps": log_every, "checkpoint_every_steps": save_every}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit("train_loop.py"):
        fewest = _SAVE_EVERY + _SLOWED + 2
        if options.num_steps < fewest:
            raise UserError(f"--num-steps={options.num_steps}: must be at least {fewest}")
        backend, num_devices = jax.default_backend(), jax.device_count()
        if backend != "cpu" or num_devices > 1:
            raise UserError(f"it cannot read traces of {num_devices} devices of kind {backend}")
        kept = store.Store(options.output, _report, ("dataset", "machine"))
        rows: list[Row] = []
        for dataset in store.progress(options.datasets, str):
            rows.append(_measure(dataset, options.num_steps, options.trace_dir))
            kept.add(rows[-1])
        print(table(rows))


if __name__ == "__main__":
    main()
