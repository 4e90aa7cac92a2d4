"""Collects evaluated runs into results/, and writes results/README.md from all collected ones.

    python -m results.collect runs

Looks for workdirs in the directories named and keeps of each what the tables and plots need, in
results/runs. A run counts if it is finished, its last checkpoint is evaluated, and its config is
that of a recipe; others are named and left out.
"""

import argparse
import importlib
import json
import logging
import pathlib
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from configs import default
from llvq import checkpointing, scaling
from llvq import config as configuration
from llvq.errors import UserError
from llvq.evaluate import read_evaluation
from llvq.training import train_state
from results import report

Run = dict[str, Any]

# What may differ between runs of one recipe.
_FREE = {
    *("seed", "dataset.data_dir", "dataset.manual_dir", "keep_checkpoints"),
    *configuration.INTERVALS,
    *("stop_on_failed_save", "images_per_device", "steps_per_call"),
}
_CURVES = {"train/reconstruction_loss", "train/distinct_codes"}
_RATE = "train/images_per_second"
_MACHINE = "machine"


def find_workdirs(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The evaluated workdirs in a directory, itself included."""
    for path in sorted(directory.rglob("evaluation.json")):
        yield path.parent


def recipe_of(config: configuration.Config) -> str:
    """The recipe that a run's config follows.

    Raises:
      UserError: if it follows none.
    """
    ours = configuration.flatten(config)
    dataset = ours["dataset.name"]
    try:
        module = importlib.import_module(f"configs.{dataset}")
    except ModuleNotFoundError as error:
        raise UserError(f"it follows no recipe: there is no configs/{dataset}.py") from error
    differences: list[list[str]] = []
    for recipe in default.RECIPES:
        config_of_recipe = module.get_config(f"{ours['quantizer.name']},{recipe}")
        scaled = scaling.scale(config_of_recipe, 1, ours["batch_size"])
        theirs = configuration.flatten(scaled)
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
    """What TensorBoard shows of a run.

    Returns:
      (step, value) pairs by name, of a step that was run twice one; and the machine that trained.
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
    """What the tables and plots need of a run.

    Args:
      workdir: of the run.
      trained_on: the machine, in words, for a run that does not say.

    Raises:
      UserError: if it is not a finished and evaluated run of a recipe.
    """
    evaluation = read_evaluation(workdir)
    config, state = checkpointing.load(workdir)
    recipe = recipe_of(config)
    step, num_steps = evaluation["step"], evaluation.pop("num_train_steps")
    if step != num_steps:
        raise UserError(f"it is at step {step} of {num_steps}")
    del evaluation["checkpoint"]
    scalars, machine = read_events(workdir)
    rates = [rate for _, rate in scalars.pop(_RATE, [])]
    return {
        "recipe": recipe,
        "seed": config["seed"],
        "machine": machine or trained_on,
        "training_images_per_second": statistics.median(rates) if rates else None,
        "quantizer_parameters": train_state.num_quantizer_parameters(state),
        "evaluation": evaluation,
        "curves": scalars,
    }


def collect(workdir: pathlib.Path, trained_on: str, results: pathlib.Path) -> None:
    """Keeps a run, figures and picture, in `results`/runs.

    Args:
      workdir: of the run.
      trained_on: the machine, in words, for a run that does not say.
      results: where tables and plots will be.

    Raises:
      UserError: as for `summarise`.
    """
    run = summarise(workdir, trained_on)
    evaluation = run["evaluation"]
    directory = results / "runs" / evaluation["dataset"] / run["recipe"] / evaluation["quantizer"]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"seed_{run['seed']}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    shutil.copyfile(workdir / "reconstructions.png", path.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # of what Orbax does
    parser = argparse.ArgumentParser(prog="results.collect", description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*", type=pathlib.Path, help="with workdirs in them")
    parser.add_argument(
        "--machine", default="not stated", help="that trained them, for runs that do not say"
    )
    options = parser.parse_args(arguments)
    for directory in options.directories:
        if not directory.is_dir():
            sys.exit(f"{parser.prog}: {directory} is not a directory")
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
