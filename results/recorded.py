"""Runs that are trained and evaluated once, each kept as one JSON file.

A study is a list of runs and a page. `train_missing(runs, workdirs)` trains the runs without a
record; `read(runs)` returns the records of the others, from which the page is made. A run whose
config has changed since is missing again.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from benchmarks.store import progress
from llvq.checkpointing import from_saved
from llvq.config import TrainConfig, to_dict
from llvq.data import Dataset
from llvq.data.files import replacing
from llvq.errors import DivergenceError
from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate

Record = dict[str, Any]


class Run(Protocol):
    """One run of a study: its name there, the file of its record, and what it trains.

    Runs are keys of dictionaries; named tuples will do. A name may contain slashes.
    """

    @property
    def name(self) -> str: ...
    @property
    def record(self) -> pathlib.Path: ...
    def config(self) -> TrainConfig: ...


AnyRun = TypeVar("AnyRun", bound=Run)


def read(runs: Iterable[AnyRun]) -> dict[AnyRun, Record]:
    """Returns the records of the finished runs: `config`, and `evaluation` or `diverged`."""
    return {run: record for run in runs if (record := _read(run.record, run.config()))}


def _read(path: pathlib.Path, config: TrainConfig) -> Record | None:
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    return record if from_saved(record["config"]) == config else None


def evaluated(runs: Iterable[AnyRun], records: Mapping[AnyRun, Record]) -> list[AnyRun]:
    """Returns the runs that have an evaluation: they are finished and did not diverge."""
    return [run for run in runs if "evaluation" in records.get(run, {})]


def missing(runs: Iterable[AnyRun]) -> Iterator[AnyRun]:
    """Yields the runs without a record, and prints which one is next."""
    runs = list(runs)
    finished = read(runs)
    yield from progress([run for run in runs if run not in finished], lambda run: run.name)


def train_missing(runs: Iterable[Run], workdirs: pathlib.Path) -> None:
    """Trains and evaluates the runs without a record, or resumes them, and keeps their records."""
    for run in missing(runs):
        keep(run, train(run.config(), workdirs / run.name))


def train(config: TrainConfig, workdir: pathlib.Path, data: Dataset | None = None) -> Record:
    """Trains and evaluates a model, or resumes it.

    Args:
      config: of the run.
      workdir: of the run.
      data: by default, the data set that the config names.

    Returns:
      The record: config and evaluation, or why training diverged.
    """
    if data is None:
        data = load(config)
    try:
        train_and_evaluate(config, workdir, data)
    except DivergenceError as error:
        print(f"{workdir}: {error}", flush=True)
        return {"config": to_dict(config), "diverged": str(error)}
    return measure(config, workdir, data)


def load(config: TrainConfig) -> Dataset:
    """Opens the data set that a config names."""
    import input_pipeline  # TensorFlow takes seconds to import

    return input_pipeline.load(**vars(config.dataset), image_shape=config.model.image_shape)


def measure(
    config: TrainConfig,
    workdir: pathlib.Path,
    data: Dataset,
    checkpoint: pathlib.Path | None = None,
) -> Record:
    """Evaluates the newest checkpoint of a workdir, or another one; returns as `train`."""
    evaluation = evaluate(workdir, data, checkpoint=checkpoint, dataset=config.dataset)
    del evaluation["checkpoint"]
    return {"config": to_dict(config), "evaluation": evaluation}


def keep(run: Run, record: Record) -> None:
    """Writes a run's record, so that `read` finds it."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    with replacing(run.record) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")
