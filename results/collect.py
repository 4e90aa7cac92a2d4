"""Collects evaluated runs into results/, and writes results/README.md from all collected ones.

    python -m results.collect runs

Looks for workdirs in the directories named and keeps in results/runs what the tables and plots need
of each. A run counts if it is finished, its last checkpoint is evaluated, and its config is that of
a recipe; others are named and left out.
"""

import argparse
import importlib
import json
import logging
import pathlib
import shutil
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from llvq import checkpointing
from llvq.config import RECIPES, TrainConfig, parse, to_dict
from llvq.data.files import replacing
from llvq.errors import UserError, one_line_exit
from llvq.evaluate import read_evaluation
from llvq.fields import flatten
from llvq.training import train_state
from results import report

Run = dict[str, Any]

# The fields that may differ between runs of one recipe.
_FREE = {
    "seed",
    "dataset.data_dir",
    "dataset.manual_dir",
    "keep_checkpoints",
    "stop_on_failed_save",
    "steps_per_call",
    *("log_every_steps", "eval_every_steps", "checkpoint_every_steps"),
}
_CURVES = {"train/reconstruction_loss", "train/distinct_codes"}
_RATE = "train/images_per_second"
_MACHINE = "machine"


def find_workdirs(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the evaluated workdirs in a directory, itself included."""
    for path in sorted(directory.rglob("evaluation.json")):
        yield path.parent


def recipe_of(config: TrainConfig) -> str:
    """Finds the recipe that the run of a checkpoint follows.

    Raises:
      UserError: if the run follows no recipe.
    """
    if not config.dataset.name:
        raise UserError("it follows no recipe: it does not name its data set")
    try:
        module = importlib.import_module(f"configs.{config.dataset.name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"it follows no recipe: there is no configs/{config.dataset.name}.py"
        ) from error
    ours = flatten(to_dict(config))
    differences: list[list[str]] = []
    for recipe in RECIPES:
        theirs = flatten(to_dict(parse(module.get_config(f"{config.quantizer.name},{recipe}"))))
        differing = [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name not in _FREE and ours.get(name) != theirs.get(name)
        ]
        if not differing:
            return recipe
        differences.append(differing)
    field = min(differences, key=len)[0]
    raise UserError(f"it follows no recipe: {field} is {ours.get(field)}")


def read_events(workdir: pathlib.Path) -> tuple[dict[str, list[tuple[int, float]]], str | None]:
    """Reads the records that a run has written for TensorBoard.

    Returns:
      (step, value) pairs by name, one for each step even if it ran twice; and the machine that
      trained.
    """
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    names = set(events.Tags()["tensors"])
    scalars: dict[str, list[tuple[int, float]]] = {}
    for name in sorted(names & {*_CURVES, _RATE}):
        by_step = {
            event.step: float(tensor_util.make_ndarray(event.tensor_proto))
            for event in events.Tensors(name)
        }
        scalars[name] = sorted(by_step.items())
    if _MACHINE not in names:
        return scalars, None
    return scalars, events.Tensors(_MACHINE)[-1].tensor_proto.string_val[0].decode()


def summarise(workdir: pathlib.Path, trained_on: str) -> Run:
    """Reads the numbers and curves of a run that the tables and plots need.

    Args:
      workdir: of the run.
      trained_on: the machine in words, for a run that has not recorded it.

    Raises:
      UserError: if it is not a finished and evaluated run of a recipe.
    """
    found = checkpointing.load(workdir)
    evaluation = read_evaluation(workdir, found.path)
    recipe = recipe_of(found.config)
    step, num_steps = evaluation["step"], evaluation.pop("num_train_steps")
    if step != num_steps:
        raise UserError(f"it is at step {step} of {num_steps}")
    del evaluation["checkpoint"]
    scalars, machine = read_events(workdir)
    rates = [rate for _, rate in scalars.pop(_RATE, [])]
    return {
        "recipe": recipe,
        "seed": found.config.seed,
        "machine": machine or trained_on,
        "training_images_per_second": statistics.median(rates) if rates else None,
        "quantizer_parameters": train_state.num_quantizer_parameters(found.state),
        "evaluation": evaluation,
        "curves": scalars,
    }


def collect(workdir: pathlib.Path, trained_on: str, results: pathlib.Path) -> None:
    """Keeps the numbers and the picture of a run in `results`/runs.

    Args:
      workdir: of the run.
      trained_on: the machine in words, for a run that has not recorded it.
      results: the directory of tables and plots.

    Raises:
      UserError: as for `summarise`.
    """
    run = summarise(workdir, trained_on)
    evaluation = run["evaluation"]
    directory = results / "runs" / evaluation["dataset"] / run["recipe"] / evaluation["quantizer"]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"seed_{run['seed']}.json"
    try:
        shutil.copyfile(workdir / "reconstructions.png", path.with_suffix(".png"))
    except FileNotFoundError as error:
        raise UserError(f"it lacks {error.filename}: evaluate it again") from error
    with replacing(path) as file:
        file.write_text(json.dumps(run, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # hides Orbax's messages
    parser = argparse.ArgumentParser(
        prog="results.collect", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directories", nargs="*", type=pathlib.Path, help="which hold workdirs")
    parser.add_argument(
        "--machine",
        default="not stated",
        help="the machine that trained, for runs that have not recorded it",
    )
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        for directory in options.directories:
            if not directory.is_dir():
                raise UserError(f"{directory} is not a directory")
        for directory in options.directories:
            for workdir in find_workdirs(directory):
                try:
                    collect(workdir, options.machine, report.DIRECTORY)
                    print(f"{workdir}: collected")
                except UserError as error:
                    print(f"{workdir}: left out, {error}")
        report.write(report.DIRECTORY)
    print(report.DIRECTORY / "README.md")


if __name__ == "__main__":
    main()
