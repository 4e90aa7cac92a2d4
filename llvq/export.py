"""Adds the newest checkpoint of an evaluated run to the trained models that the project ships.

    python -m llvq.export --workdir=runs/vq --command="python main.py --config=… --workdir=runs/vq"

Writes the parameters to checkpoints/<data set>/<quantizer>, or to the --name given, and an entry to
checkpoints/index.json.
"""

import argparse
import json
import re
from collections.abc import Sequence

from etils import epath

from llvq import checkpointing, pretrained
from llvq.codec import code_model as code_models
from llvq.config import to_dict
from llvq.data.files import writing
from llvq.errors import UserError, one_line_exit
from llvq.evaluate import read_evaluation


def export(workdir: epath.PathLike, command: str, name: str = "") -> str:
    """Copies what inference needs of a run's newest checkpoint, with what its evaluation found.

    Args:
      workdir: of the run; has the evaluation.json of its newest checkpoint.
      command: what trained it, for the index.
      name: two words, e.g. "photos/vq"; if empty, the names of the data set and the quantizer.

    Returns:
      The model's name.

    Raises:
      UserError: if there is no checkpoint, it has not been evaluated, or the name is taken or not
        two words.
    """
    checkpoint = checkpointing.load(workdir)
    config, state = to_dict(checkpoint.config), checkpoint.state
    if not config["dataset"]["name"] and not name:
        raise UserError(f"{checkpoint.path} does not say what it was trained on: give it a --name")
    evaluation = read_evaluation(workdir, checkpoint.path)
    name = name or f"{config['dataset']['name']}/{config['quantizer']['name']}"
    if not re.fullmatch(r"\w+/\w+", name):
        raise UserError(f"--name={name}: must be two words, such as photos/vq")
    # Local paths are of no use to others.
    paths = ("data_dir", "manual_dir")
    dataset = {field: value for field, value in config["dataset"].items() if field not in paths}
    config = {**config, "dataset": dataset}
    del config["init_from"]
    directory = pretrained.DIRECTORY / name
    checkpointing.save_for_inference(directory, state, config)
    code_model = code_models.load(checkpoint.path)
    if code_model and code_model.belongs_to(checkpointing.model_of(checkpoint)):
        code_model.save(directory)
    for marker in directory.rglob("commit_success.txt"):
        marker.write_text("")  # Orbax only checks that it exists, but writes the path into it

    about_run = {"dataset", "quantizer", "checkpoint", "step", "num_train_steps"}
    entry = {
        "command": command,
        "seed": config["seed"],
        "step": int(state.step),
        "metrics": {key: value for key, value in evaluation.items() if key not in about_run},
        "config": config,
    }
    index = dict(sorted({**pretrained.pretrained_index(), name: entry}.items()))
    with writing(pretrained.DIRECTORY / "index.json") as file:
        file.write_text(json.dumps(index, indent=2) + "\n")
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line."""
    parser = argparse.ArgumentParser(
        prog="llvq.export", description="Adds a trained and evaluated run to checkpoints/."
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--command", required=True, help="the command that trained it")
    parser.add_argument("--name", default="", help="if not DATA SET/QUANTIZER")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        print(f"{pretrained.DIRECTORY / export(options.workdir, options.command, options.name)}")


if __name__ == "__main__":
    main()
