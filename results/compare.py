"""Compares the quantizers on FashionMNIST at equal coded bits, and writes results/compare.md.

    python -m results.compare [--only fsq lfq] [--trials] [--write] [--workdirs=runs/compare]

Trains FashionMNIST's network with each quantizer at several rates, evaluates it, and keeps one
record for each finished run in results/compare. A run that has a record is skipped; one that was
stopped is resumed. All runs together take some 10 hours on two quiet CPU cores; `--only` runs only
these curves, `--trials` the trials that came before.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from llvq.errors import one_line_exit
from llvq.quantizers import QUANTIZERS
from llvq.runtime.console import markdown_table
from results import pages
from results.compared import (
    BASELINE,
    DIRECTORY,
    FIRST,
    RUNS,
    SEED,
    TRIALS,
    Run,
    bd_rate,
    first_of,
    further,
    gain,
)
from results.curves import CURVES, LATTICES
from results.intervals import spread
from results.recorded import Record, evaluated, read, train_missing

_ANCHORS = (BASELINE, "sparse_lattice", "fsq")

_NUMBERS = {
    "coded bits per vector": ("coded_bits_per_vector", ".3f"),
    "with contexts": ("context_coded_bits_per_vector", ".3f"),
    "coded bits per pixel": ("coded_bits_per_pixel", ".3f"),
    "test MSE": ("reconstruction_loss", ".5f"),
    "PSNR": ("psnr", ".2f"),
}
_NAMES = ("quantizer", "latent_dim, activation", "setting", "seed", "epochs")
_COLUMNS = (*_NAMES, *_NUMBERS, "codes in use")


def _cells(run: Run, record: Record) -> list[str]:
    curve, evaluation, model = CURVES[run.curve], record["evaluation"], record["config"]["model"]
    prefix = "quantizer."
    of_quantizer = [
        f"{field.removeprefix(prefix)} {value}"
        for field, value in run.changes
        if field.startswith(prefix)
    ]
    codes = f"{evaluation['effective_codebook_size']:,}"
    if "codebook_utilization" in evaluation:
        codes += f" ({evaluation['codebook_utilization']:.1%})"
    return [
        f"`{run.curve}`",
        f"{model['latent_dim']}, {model['latent_activation']}",
        ", ".join([curve.setting(run.value), *of_quantizer]),
        str(run.seed),
        str(run.epochs),
        *pages.cells([evaluation], _NUMBERS),
        codes,
    ]


_SPREAD_NUMBERS = {
    "coded bits per vector": ("coded_bits_per_vector", ".2f"),
    "test MSE": ("reconstruction_loss", ".5f"),
    "PSNR": ("psnr", ".2f"),
    "codes in use": ("effective_codebook_size", ",.0f"),
}
_GAIN = f"PSNR above `{BASELINE}`, dB"
_SPREAD_COLUMNS = ("quantizer", "setting", "seeds", *_SPREAD_NUMBERS, _GAIN)


def _of_several_seeds(records: Mapping[Run, Record]) -> list[list[Run]]:
    """Groups runs that differ in their seeds alone."""
    more = [run for run in further(records) if run.seed != SEED]
    firsts = dict.fromkeys(run._replace(seed=SEED) for run in more)
    groups = (
        [first, *(run for run in more if run._replace(seed=SEED) == first)] for first in firsts
    )
    return [evaluated(runs, records) for runs in groups]


def _spread_cells(runs: Sequence[Run], records: Mapping[Run, Record]) -> list[str]:
    gains = [found for run in runs if (found := gain(run, records)) is not None]
    return [
        f"`{runs[0].curve}`",
        CURVES[runs[0].curve].setting(runs[0].value),
        ", ".join(str(run.seed) for run in runs),
        *pages.cells((records[run]["evaluation"] for run in runs), _SPREAD_NUMBERS),
        spread(gains, ".2f") if len(gains) == len(runs) else "",
    ]


_LATTICE_COLUMNS = (
    "quantizer",
    "λ",
    "seed",
    "epochs",
    "rate in the loss",
    "bits coded by its density",
    "by counts",
    "active dimensions",
    "bits per active dimension",
    "second moment of the error",
    "the lattice's",
)


def _lattice_cells(run: Run, record: Record) -> list[str]:
    evaluation = record["evaluation"]
    active, bits = evaluation["active_dimensions"], evaluation["coded_bits_per_vector"]
    lattice = getattr(QUANTIZERS[CURVES[run.curve].quantizer].constructor, "lattice", None)
    return [
        f"`{run.curve}`",
        str(run.value),
        str(run.seed),
        str(run.epochs),
        f"{evaluation['rate']:.3f}",
        f"{evaluation['density_coded_bits_per_vector']:.3f}",
        f"{bits:.3f}",
        f"{active:.1f} of {record['config']['model']['latent_dim']}",
        f"{bits / active:.2f}" if active else "",
        f"{evaluation['second_moment']:.4f}" if "second_moment" in evaluation else "",
        f"{lattice.second_moment:.4f}" if lattice else "",
    ]


def _plot(records: Mapping[Run, Record], path: Path) -> None:
    """Lattices with a rate in the loss have dashes and squares, the others lines and circles."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    others = [name for name in CURVES if name not in LATTICES]
    for names, style in ((others, "o-"), (LATTICES, "s--")):
        for i, name in enumerate(names):
            found = [records[run]["evaluation"] for run in evaluated(first_of(name), records)]
            found.sort(key=lambda evaluation: evaluation["coded_bits_per_pixel"])
            rates = [evaluation["coded_bits_per_pixel"] for evaluation in found]
            for ax, figure_name in zip(axes, ("reconstruction_loss", "psnr"), strict=True):
                values = [evaluation[figure_name] for evaluation in found]
                ax.plot(rates, values, style, color=f"C{i}", label=name if found else None)
    axes[0].set(title="test MSE", xlabel="coded bits per pixel", yscale="log")
    axes[1].set(title="PSNR, dB", xlabel="coded bits per pixel")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    pages.save_plot(figure, path, dpi=90)


_HEADER = """# Quantizers at equal coded bits

`python -m results.compare` wrote this page; do not edit it by hand. Each run trains FashionMNIST's
network for three epochs with the schedule `cosine`. Coded bits are the size of the test
split's codes as one file, each coded by how often it occurs in the training split (order 0); "with
contexts", its neighbours predict it. `vq_restarts` and `vq_ema_restarts` are `vq` and `vq_ema`
with dead codes restarted and the codebook initialised from the first batch.

Most runs were trained on CPUs. These runs of three epochs with seed 2 were trained on a GPU, in
float32: `vq` with 64 vectors or more, `lfq` with up to 64 codes, `multirate_lattice`, and
`d4_lattice` at the two largest λ. `lfq` with more codes, `learned_lattice` at the three largest λ
and `leech_lattice` were trained on both.
"""

_BD_RATE = """## Bits against the best VQ and two others

Bjøntegaard's delta rate at equal PSNR, without the points that take more bits than another one of
their curve for no more PSNR. It is empty where a curve is not finished, or where the two curves
share no range of PSNR.
"""


_SEEDS = f"""\
Mean ± standard deviation over the seeds. The last column says how far a run's PSNR is above the
curve of `{BASELINE}` with seed 2 at the run's rate.
"""

_LATTICES_TEXT = """\
The rate is that of the points of the test images. It is exact for `diagonal_lattice`: a stream
coded by the density takes as many bits, or less where rare codes are escaped, because counts code
those. For the other lattices the rate is the density times a cell's volume, whose sum over all
points need not be 1; where it is more, the stream's tables are scaled down. The error's second
moment is per dimension, divided by the cell's volume to the power of 2/n; the lattice's own is that
of errors spread evenly over a cell.
"""


def write(records: Mapping[Run, Record]) -> None:
    """Writes the page and the plot."""

    def table(runs: Sequence[Run]) -> str:
        cells = [_cells(run, records[run]) for run in evaluated(runs, records)]
        return markdown_table(_COLUMNS, cells)

    def lattices() -> str:
        runs = [run for run in (*FIRST, *further(records)) if run.curve in LATTICES]
        return markdown_table(
            _LATTICE_COLUMNS,
            [_lattice_cells(run, records[run]) for run in evaluated(runs, records)],
        )

    def differences(name: str) -> list[str]:
        values = [bd_rate(name, records, anchor) for anchor in _ANCHORS]
        return [f"`{name}`", *("" if value is None else f"{value:+.1f}%" for value in values)]

    parts = [
        _HEADER,
        "![MSE and PSNR against coded bits per pixel](compare.png)\n",
        table(FIRST) + "\n",
        _BD_RATE,
        markdown_table(
            ("quantizer", *(f"against `{anchor}`" for anchor in _ANCHORS)), map(differences, CURVES)
        ),
        "\n## More seeds, and ten epochs\n",
        _SEEDS,
        markdown_table(
            _SPREAD_COLUMNS, [_spread_cells(runs, records) for runs in _of_several_seeds(records)]
        )
        + "\n",
        table(further(records)),
        "\n## Lattices with a rate in the loss\n",
        _LATTICES_TEXT,
        lattices(),
        "\n## Trials\n",
        "They chose the latents and the weight of entropies, and show what γ does and how lattices "
        "learn. All but the last have one epoch.\n",
        table(TRIALS),
    ]
    path = DIRECTORY.parent / "compare.md"
    path.write_text("\n".join(parts) + "\n")
    _plot(records, path.with_suffix(".png"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = pages.make_parser("results.compare", __doc__)
    parser.add_argument("--only", nargs="+", choices=list(CURVES), help="run only these curves")
    parser.add_argument("--trials", action="store_true", help="run the trials instead")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        if not options.write:
            _train_missing(options)
        write(read([*RUNS, *further(read(FIRST))]))


def _train_missing(options: argparse.Namespace) -> None:
    def train(runs: Iterable[Run]) -> None:
        wanted = [run for run in runs if run.curve in (options.only or CURVES)]
        train_missing(wanted, options.workdirs)

    if options.trials:
        train(TRIALS)
    else:
        train(FIRST)
        train(further(read(FIRST)))


if __name__ == "__main__":
    main()
