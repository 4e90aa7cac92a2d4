"""Measures what the LeakyReLU at the end of the paper's decoder costs.

    python -m results.output_activation          # trains missing runs, resumes interrupted ones
    python -m results.output_activation --write  # writes results/output_activation.md

Each quantizer is trained with and without the activation, with the same seeds, and therefore with
the same initial parameters and the same order of images: differences are paired.
"""

import itertools
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from configs import fashion_mnist
from llvq.config import TrainConfig, parse
from llvq.data.files import replacing
from llvq.errors import one_line_exit
from llvq.runtime.console import markdown_table
from results import intervals, pages, recorded

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
encoder. Numbers are means over the seeds named, and "gain" is the mean difference between runs
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
    def name(self) -> str:
        """The run's place in the directory of records."""
        return f"{self.quantizer}/{self.activation}_{self.epochs}_epochs_seed_{self.seed}"

    @property
    def record(self) -> pathlib.Path:
        """The file of the run's record."""
        return DIRECTORY / f"{self.name}.json"

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


def train(workdirs: pathlib.Path) -> None:
    """Trains and evaluates the runs that have no record."""
    for run in recorded.missing(RUNS):
        workdir = workdirs / run.quantizer / run.activation / f"seed_{run.seed}"
        recorded.keep(run, recorded.train(run.config(), workdir))
        if run.epochs == _EPOCHS[-1]:
            shutil.rmtree(workdir)


def _row(
    quantizer: str, epochs: int, records: Mapping[Run, recorded.Record]
) -> tuple[list[float], list[str]] | None:
    """Returns (gains in dB, cells) after some epochs; None before any pair is finished."""
    pairs: dict[int, list[Mapping[str, float]]] = {}  # evaluations with and without, by seed
    for seed in _SEEDS:
        pair = [Run(quantizer, activation, seed, epochs) for activation in _ACTIVATIONS]
        if len(recorded.evaluated(pair, records)) == len(pair):
            pairs[seed] = [records[run]["evaluation"] for run in pair]
    if not pairs:
        return None

    def differences(name: str) -> list[float]:
        return [new[name] - old[name] for old, new in pairs.values()]

    cells = [quantizer, str(epochs), ", ".join(map(str, pairs))]
    for name, digits in (("psnr", ".2f"), ("reconstruction_loss", ".5f")):
        for evaluations in zip(*pairs.values(), strict=True):
            cells.append(intervals.text([each[name] for each in evaluations], digits))
    cells.append(intervals.text(differences("psnr"), "+.2f"))
    cells.append(intervals.text(differences("coded_bits_per_vector"), "+.2f"))
    return differences("psnr"), cells


def page() -> str:
    """Returns the page of results."""
    records = recorded.read(RUNS)
    rows = [
        row
        for quantizer, epochs in itertools.product(_QUANTIZERS, _EPOCHS)
        if (row := _row(quantizer, epochs, records))
    ]
    means = [sum(gains) / len(gains) for gains, _ in rows]
    answer = (
        f"Without the activation, PSNR is {min(means):.1f} to {max(means):.1f} dB higher after "
        f"the same training ({len(records)} of {len(RUNS)} runs are finished). "
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
    parser = pages.make_parser("results.output_activation", __doc__)
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        if not options.write:
            train(options.workdirs)
        with replacing(DIRECTORY.with_suffix(".md")) as file:
            file.write_text(page())


if __name__ == "__main__":
    main()
