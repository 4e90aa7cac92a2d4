"""Runs that are trained and evaluated once, each kept as one JSON file."""

import json
import pathlib
from typing import Any

from llvq.config import TrainConfig, completed, parse, to_dict
from llvq.data import Dataset
from llvq.data.files import replacing
from llvq.errors import DivergenceError
from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate

Record = dict[str, Any]


def read(path: pathlib.Path, config: TrainConfig) -> Record | None:
    """The record in a file; None if there is none, or if it is of another config."""
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    return record if to_dict(parse(completed(record["config"]))) == to_dict(config) else None


def train(config: TrainConfig, workdir: pathlib.Path, data: Dataset) -> Record:
    """Trains and evaluates a model, or goes on with it.

    Returns:
      The config and what evaluation gives, or why training diverged.
    """
    try:
        train_and_evaluate(config, workdir, data)
    except DivergenceError as error:
        print(f"{workdir}: {error}", flush=True)
        return {"config": to_dict(config), "diverged": str(error)}
    return measure(config, workdir, data)


def measure(
    config: TrainConfig,
    workdir: pathlib.Path,
    data: Dataset,
    checkpoint: pathlib.Path | None = None,
) -> Record:
    """As `train`, of a workdir that is trained, or of another checkpoint."""
    evaluation = evaluate(config, workdir, data, checkpoint=checkpoint)
    del evaluation["checkpoint"]
    return {"config": to_dict(config), "evaluation": evaluation}


def keep(path: pathlib.Path, record: Record) -> None:
    """Writes a record, so that `read` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps(record, indent=1) + "\n")
