"""What the LeakyReLU at the end of the paper's decoder costs.

    python -m results.output_activation          # trains what is missing; resumes what was stopped
    python -m results.output_activation --write  # writes results/output_activation.md

Each quantizer is trained with and without the activation, with the same seeds, and therefore with
the same initial parameters and the same order of images: differences are paired.
"""

import argparse
import itertools
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import input_pipeline
from configs import fashion_mnist
from llvq.config import TrainConfig, parse
from llvq.data.files import replacing
from llvq.runtime.console import markdown_table
from results import intervals, recorded

DIRECTORY = pathlib.Path(__file__).parent / "output_activation"

_QUANTIZERS = ("vq", "vq_ema", "sparse_lattice", "fsq")
_ACTIVATIONS = ("leaky_relu", "none")
_SEEDS = (2, 32, 432)
_EPOCHS = (1, 3)  # a run of three epochs continues the run of one

_PAGE = """# The activation at the end of the decoder

`python -m results.output_activation --write` wrote this page; do not edit it by hand.

{answer}

The paper's decoder ends in a LeakyReLU of slope 0.01. Half of FashionMNIST's pixels are exactly
−0.5; to say so, the layer before the activation has to reach −50. The runs follow the recipe
`paper` with `schedule=constant`, and FSQ, which is not in the paper, has no activation after the
encoder. The figures are means over the seeds named, and "gain" is the mean difference between runs
of the same seed without and with the activation, with its 95% t-interval.

{table}
"""


class Run(NamedTuple):
    """One run of the study."""

    quantizer: str
    activation: str
    seed: int
    epochs: int

    @property
    def record(self) -> pathlib.Path:
        """The file of the finished run's figures."""
        name = f"{self.activation}_{self.epochs}_epochs_seed_{self.seed}.json"
        return DIRECTORY / self.quantizer / name

    @property
    def workdir(self) -> pathlib.Path:
        """Where it trains, within the directory of all runs."""
        return pathlib.Path(self.quantizer, self.activation, f"seed_{self.seed}")

    def config(self) -> TrainConfig:
        """Returns the run's config."""
        config = fashion_mnist.get_config(f"{self.quantizer},paper")
        config.model.output_activation = self.activation
        if self.quantizer == "fsq":
            config.model.latent_activation = "none"
        config.schedule = "constant"
        config.seed, config.num_epochs = self.seed, self.epochs
        return parse(config)


RUNS = [
    Run(quantizer, activation, seed, epochs)
    for seed, quantizer, activation, epochs in itertools.product(
        _SEEDS, _QUANTIZERS, _ACTIVATIONS, _EPOCHS
    )
]


def read() -> dict[Run, Mapping[str, Any]]:
    """Returns the evaluations of the finished runs."""
    found = {run: recorded.read(run.record, run.config()) for run in RUNS}
    return {run: record["evaluation"] for run, record in found.items() if record}


def train(directory: pathlib.Path) -> None:
    """Trains and evaluates the runs that have no record."""
    for run in RUNS:
        config = run.config()
        if recorded.read(run.record, config):
            continue
        data = input_pipeline.load(**vars(config.dataset), image_shape=config.model.image_shape)
        workdir = directory / run.workdir
        recorded.keep(run.record, recorded.train(config, workdir, data))
        if run.epochs == _EPOCHS[-1]:
            shutil.rmtree(workdir)


def _row(
    quantizer: str, epochs: int, evaluations: Mapping[Run, Mapping[str, Any]]
) -> tuple[list[float], list[str]] | None:
    """(gains in dB, cells) of one quantizer after some epochs; None before any pair is finished."""
    pairs = {
        seed: [
            evaluations.get(Run(quantizer, activation, seed, epochs)) for activation in _ACTIVATIONS
        ]
        for seed in _SEEDS
    }
    whole = {seed: (old, new) for seed, (old, new) in pairs.items() if old and new}
    if not whole:
        return None
    gains = [new["psnr"] - old["psnr"] for old, new in whole.values()]
    cells = [quantizer, str(epochs), ", ".join(map(str, whole))]
    for figure, digits in (("psnr", ".2f"), ("reconstruction_loss", ".5f")):
        for of_activation in zip(*whole.values(), strict=True):
            cells.append(intervals.text([of_run[figure] for of_run in of_activation], digits))
    cells.append(intervals.text(gains, "+.2f"))
    bits = [
        new["coded_bits_per_vector"] - old["coded_bits_per_vector"] for old, new in whole.values()
    ]
    cells.append(intervals.text(bits, "+.2f"))
    return gains, cells


def page() -> str:
    """Returns the page of results."""
    evaluations = read()
    rows = [
        row
        for quantizer, epochs in itertools.product(_QUANTIZERS, _EPOCHS)
        if (row := _row(quantizer, epochs, evaluations))
    ]
    means = [sum(gains) / len(gains) for gains, _ in rows]
    answer = (
        f"Without the activation, PSNR is {min(means):.1f} to {max(means):.1f} dB higher after "
        f"the same training ({len(evaluations)} of {len(RUNS)} runs are finished). "
        if rows
        else "No pair of runs is finished yet. "
    )
    header = (
        *("quantizer", "epochs", "seeds", "PSNR with", "PSNR without", "MSE with", "MSE without"),
        *("gain, dB", "coded bits per vector, difference"),
    )
    table = markdown_table(header, [cells for _, cells in rows])
    return _PAGE.format(answer=answer.strip(), table=table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        prog="results.output_activation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="only write the page")
    parser.add_argument(
        "--runs", type=pathlib.Path, default=pathlib.Path("runs/output_activation"), help="workdirs"
    )
    options = parser.parse_args(arguments)
    if not options.write:
        train(options.runs)
    with replacing(DIRECTORY.with_suffix(".md")) as file:
        file.write_text(page())


if __name__ == "__main__":
    main()
