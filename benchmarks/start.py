r"""The time from starting a training run to the end of its first step, by what it is spent on.

    python benchmarks/start.py [--datasets fashion_mnist] [--repeats=5] \
        [--output=results/start.json]

Starts `python main.py` in a new process each time and stops it after its first step: with no
compiled program in the cache, and with all of them. Where main.py lacks a package (on a bare
machine with a GPU, say), and for data sets that are not at hand, `llvq.train` trains on random
images instead.

The phases are: imports; data, until it can be read; model, until the first call of the step (state,
directory of checkpoints and first batch); compilation of that step, or reading it from the cache;
and the step itself.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import operator
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# This process holds the accelerator too, to name it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, os.fspath(ROOT))

from benchmarks import comparison, store
from benchmarks.settings import DATASETS, get_config
from llvq.errors import one_line_exit

PHASES = ("imports", "data", "model", "compilation", "first step")
_QUANTIZER = "sparse_lattice"
_PACKAGES = ("clu", "ml_collections", "tensorflow", "tensorflow_datasets")
_CACHED = "in the cache"
_PROGRAMS = (_CACHED, "not compiled yet")
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class _Done(BaseException):
    """The first step has been taken."""


def start(dataset: str, workdir: str, started: float) -> dict[str, float]:
    """Trains for one step, in a process that was started at this time.

    Returns:
      The seconds that each phase took.
    """
    times = [started]

    if _is_whole(dataset):
        import main
    import jax

    from llvq import train

    times.append(time.time())
    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILING:
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    step, check_data = train.VQVAETask.step, train.check_data

    def checked(*arguments: Any) -> None:
        times.append(time.time())
        check_data(*arguments)

    def stepped(*arguments: Any) -> Any:
        times.append(time.time())
        compiling.clear()
        jax.block_until_ready(step(*arguments))
        times.append(times[-1] + sum(compiling))
        times.append(time.time())
        raise _Done

    patched: Any = train
    patched.check_data, patched.VQVAETask.step = checked, stepped
    with contextlib.suppress(_Done):
        if _is_whole(dataset):
            from absl import app

            name = f"{ROOT}/configs/{dataset}.py:{_QUANTIZER}"
            sys.argv = ["main.py", f"--config={name}", f"--workdir={workdir}"]
            app.run(main.main, flags_parser=main._parse_flags)
        else:
            _train_on_random_images(dataset, workdir)
    return dict(zip(PHASES, map(operator.sub, times[1:], times), strict=True))


def _is_whole(dataset: str) -> bool:
    """Says whether main.py can train on the data set here."""
    return dataset == "fashion_mnist" and all(map(importlib.util.find_spec, _PACKAGES))


def _train_on_random_images(dataset: str, workdir: str) -> None:
    import jax

    from benchmarks.train_step import random_images
    from llvq.data import ArrayDataset
    from llvq.train import train_and_evaluate

    cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])  # as main.py has it
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache / "llvq"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = get_config(dataset, _QUANTIZER)
    images = random_images(config)
    train_and_evaluate(config, workdir, ArrayDataset(train=images, validation=images[:1]))


def measure_once(dataset: str, cache: str) -> dict[str, float]:
    """Returns the seconds of each phase of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as workdir:
        child = [sys.executable, __file__, f"--child={dataset}", f"--workdir={workdir}"]
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [*child, f"--started={time.time()}"]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{dataset}: the run failed:\n{result.stderr[-2000:]}")
    phases: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return phases


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = comparison.make_parser("start.py", __doc__)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["fashion_mnist"])
    for name in ("child", "workdir"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    if options.child:
        print(json.dumps(start(options.child, options.workdir, options.started)))
        return
    with one_line_exit("start.py"):
        comparison.check_options(options)
        kept = store.Store(options.output, comparison.report)
        where = store.source("start.py", "jax", "flax")
        cases: list[store.Row] = [
            {**where, "setting": {"data set": dataset, "programs": programs}}
            for dataset, programs in itertools.product(options.datasets, _PROGRAMS)
        ]
        if options.resume:
            cases = [case for case in cases if not kept.find(case)]
        for case in store.progress(cases, lambda case: store.words(case["setting"])):
            row = {**case, "unit": "runs", "amount": 1, "memory_bytes": {}}
            row["load"] = os.getloadavg()[0]
            dataset, programs = case["setting"].values()
            runs = _runs(dataset, programs, options.repeats)
            row["seconds"] = {phase: [run[phase] for run in runs] for phase in PHASES}
            row["seconds"]["all"] = [sum(run.values()) for run in runs]
            kept.add(row)
            print(comparison.comparison_table([row]))


def _runs(dataset: str, programs: str, repeats: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as directory:
        if programs == _CACHED:
            measure_once(dataset, directory)  # fills the cache
            return [measure_once(dataset, directory) for _ in range(repeats)]
        return [measure_once(dataset, f"{directory}/{number}") for number in range(repeats)]


if __name__ == "__main__":
    main()
