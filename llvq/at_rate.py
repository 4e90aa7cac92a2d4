"""Makes a checkpoint of one of a multirate model's rates, for everything that takes a checkpoint.

    python -m llvq.at_rate --checkpoint=runs/multirate --rate=1 --output=runs/multirate_1

The new one is of the plain lattice, with parameters only. Rates are counted from 0.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from etils import epath

from llvq import checkpointing
from llvq.config import to_dict
from llvq.errors import UserError, one_line_exit


def at_rate(source: epath.PathLike, rate: int, directory: epath.PathLike) -> None:
    """Writes a checkpoint of a multirate model's network with the lattice of one rate.

    Args:
      source: a checkpoint, or a workdir, whose newest one is meant.
      rate: which of `rate_weights`, from 0 on.
      directory: of the new checkpoint; must not exist, or be empty.

    Raises:
      UserError: if there is no such checkpoint, if it is not of a `multirate_lattice` or has no
        such rate, or if the directory holds something or cannot be written.
    """
    checkpoint = checkpointing.load(source)
    config, params = to_dict(checkpoint.config), dict(checkpoint.state.params)
    quantizer = config["quantizer"]
    if quantizer["name"] != "multirate_lattice":
        raise UserError(
            f"{checkpoint.path} is of {quantizer['name']}: only multirate_lattice has several rates"
        )
    weights = quantizer.pop("rate_weights")
    if not 0 <= rate < len(weights):
        raise UserError(f"rate {rate}: {checkpoint.path} has rates 0 to {len(weights) - 1}")
    quantizer |= {"name": quantizer.pop("lattice"), "rate_weight": weights[rate]}
    config["quantizer"] = quantizer
    params["quantizer"] = params["quantizer"]["rates"][rate]
    state = dataclasses.replace(checkpoint.state, params=params)
    checkpointing.save_for_inference(directory, state, config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line."""
    parser = argparse.ArgumentParser(
        prog="llvq.at_rate", description="Makes a checkpoint of one of a multirate model's rates."
    )
    parser.add_argument("--checkpoint", required=True, help="of a multirate_lattice, or a workdir")
    parser.add_argument("--rate", required=True, type=int, help="which one, from 0 on")
    parser.add_argument("--output", required=True, help="the new checkpoint's directory")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        at_rate(options.checkpoint, options.rate, options.output)


if __name__ == "__main__":
    main()
