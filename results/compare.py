"""Compares the quantizers on FashionMNIST at equal coded bits, and writes results/compare.md.

    python -m results.compare [--only fsq lfq] [--trials] [--write] [--workdirs=runs/compare]

Trains FashionMNIST's network with each quantizer at several rates, evaluates it, and keeps one
record for each finished run in results/compare. A run that has a record is skipped; one that was
stopped is resumed. All runs together take some 9 hours on two quiet CPU cores; `--only` runs only
these curves, `--trials` the trials that came before.
"""

import argparse
import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import bjontegaard
import matplotlib.pyplot as plt

import input_pipeline
from configs import fashion_mnist
from llvq.config import TrainConfig, parse
from llvq.data import Dataset
from llvq.errors import one_line_exit
from llvq.quantizers import QUANTIZERS
from llvq.runtime.console import markdown_table
from results import recorded
from results.curves import CURVES, LATTICES

DIRECTORY = pathlib.Path(__file__).parent / "compare"

SEED, MORE_SEEDS = 2, (32, 432)
_EPOCHS, _STEPS_PER_EPOCH = 3, 860


class Run(NamedTuple):
    """One run of a curve; `changes` to its config are (dotted field, value)."""

    curve: str
    value: Any
    seed: int = SEED
    epochs: int = _EPOCHS
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The run's place in the directories of records and workdirs."""
        value = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        changes = "".join(f"_{value}" for _, value in self.changes)
        return f"{self.curve}/{value}{changes}_{self.epochs}_epochs_seed_{self.seed}"

    @property
    def record(self) -> pathlib.Path:
        """The file of the finished run's figures."""
        return DIRECTORY / f"{self.name}.json"

    def config(self) -> TrainConfig:
        """The run's config: recipe `long`, but shorter."""
        curve = CURVES[self.curve]
        config = curve.at(self.value, fashion_mnist.get_config(f"{curve.quantizer},long"))
        config.seed, config.num_epochs = self.seed, self.epochs
        config.eval_every_steps = _STEPS_PER_EPOCH
        config.update_from_flattened_dict(dict(self.changes))
        return parse(config)


BASELINE = "vq_ema_restarts"
_ANCHORS = (BASELINE, "sparse_lattice", "fsq")

# They choose the latents and the weight of entropies, and show what γ does and how lattices with a
# rate learn.
_GAMMAS = (1.0, 0.1, 0.01, 0.001)
_ENTROPY_WEIGHTS = (0.1, 0.01, 0.001)
_LATENTS = ((8, "none"), (64, "none"))
_TRIED = {
    "vq_restarts": ((4, "none"), *_LATENTS, (64, "leaky_relu")),
    "vq_ema_restarts": ((4, "none"), *_LATENTS),
    "simvq": _LATENTS,
    "residual_vq": _LATENTS,
    "diagonal_lattice": ((8, "straight_through"), (8, "noise"), (4, "noise")),
    "e8_lattice": ((8, "straight_through"), (8, "noise"), (8, "mixed"), (16, "noise")),
    "learned_lattice": ((8, "noise"),),
}


def _trial(curve: str, *changes: tuple[str, Any]) -> Run:
    return Run(curve, CURVES[curve].values[1], SEED, 1, changes)


def _trial_of_latents(curve: str, latent_dim: int, choice: str) -> Run:
    choices = "quantizer.training" if curve in LATTICES else "model.latent_activation"
    return _trial(curve, ("model.latent_dim", latent_dim), (choices, choice))


TRIALS = [
    *(_trial("sparse_lattice", ("quantizer.gamma", gamma)) for gamma in _GAMMAS),
    *(
        _trial(curve, ("quantizer.entropy_weight", weight))
        for curve, weight in itertools.product(("lfq", "bsq"), _ENTROPY_WEIGHTS)
    ),
    *(_trial_of_latents(curve, *tried) for curve, several in _TRIED.items() for tried in several),
    Run("e8_lattice", 2.5e-4, changes=(("quantizer.training", "mixed"),)),
]
FIRST = [Run(name, value) for name, curve in CURVES.items() for value in curve.values]


def read(runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
    """The records of those of the runs that are finished, with the config of today."""
    found = {run: recorded.read(run.record, run.config()) for run in runs}
    return {run: record for run, record in found.items() if record is not None}


def _evaluated(runs: Iterable[Run], records: Mapping[Run, Mapping[str, Any]]) -> list[Run]:
    """Those of the runs that have figures: they are finished and did not diverge."""
    return [run for run in runs if "evaluation" in records.get(run, {})]


def _first(name: str) -> list[Run]:
    return [run for run in FIRST if run.curve == name]


def rate(record: Mapping[str, Any]) -> float:
    """Coded bits per pixel."""
    return record["evaluation"]["coded_bits_per_pixel"]


def psnr(record: Mapping[str, Any]) -> float:
    """PSNR over the test images, in dB."""
    return record["evaluation"]["psnr"]


def curve_of(name: str, records: Mapping[Run, Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(rate, PSNR) of a curve's first runs, by ascending rate, where more bits give more PSNR."""
    runs = _evaluated(_first(name), records)
    curve: list[tuple[float, float]] = []
    for point in sorted((rate(records[run]), psnr(records[run])) for run in runs):
        if not curve or point[1] > curve[-1][1]:
            curve.append(point)
    return curve


def bd_rate(
    name: str, records: Mapping[Run, Mapping[str, Any]], anchor: str = BASELINE
) -> float | None:
    """How many percent more bits a curve takes than another one at equal PSNR, on average.

    Bjøntegaard's delta rate, with piecewise cubic interpolation, over the PSNR that both curves
    reach. None if a curve is not finished, or if they do not overlap.
    """
    if any(run not in records for run in (*_first(name), *_first(anchor))):
        return None
    ours, theirs = curve_of(name, records), curve_of(anchor, records)
    if not (ours and theirs) or max(ours[0][1], theirs[0][1]) >= min(ours[-1][1], theirs[-1][1]):
        return None
    old, new = (list(zip(*points, strict=True)) for points in (theirs, ours))
    return float(
        bjontegaard.bd_rate(
            *old, *new, method="pchip", require_matching_points=False, min_overlap=0
        )
    )


def nearest(name: str, records: Mapping[Run, Mapping[str, Any]]) -> Run:
    """The first run of a curve whose coded bits per vector are nearest to 5."""
    runs = _evaluated(_first(name), records)
    per_vector = "coded_bits_per_vector"
    return min(runs, key=lambda run: abs(records[run]["evaluation"][per_vector] - 5.0))


def further(records: Mapping[Run, Mapping[str, Any]]) -> list[Run]:
    """The runs after the first ones: more seeds for six curves, and ten epochs for three."""
    if any(run not in records for run in FIRST):
        return []

    def loss(name: str) -> float:
        difference = bd_rate(name, records)
        return math.inf if difference is None else difference

    others = [name for name in CURVES if name not in (*LATTICES, "sparse_lattice")]
    best, best_lattices = sorted(others, key=loss)[:3], sorted(LATTICES, key=loss)[:2]
    chosen = {name: nearest(name, records) for name in (*best, "sparse_lattice", *best_lattices)}
    longer = dict.fromkeys((nearest("vq", records), chosen[best[0]], chosen[best_lattices[0]]))
    seeds = [run._replace(seed=seed) for run in chosen.values() for seed in MORE_SEEDS]
    return [*seeds, *(run._replace(epochs=10) for run in longer)]


_COLUMNS = (
    "quantizer",
    "latent_dim, activation",
    "setting",
    "seed",
    "epochs",
    "coded bits per vector",
    "with contexts",
    "coded bits per pixel",
    "test MSE",
    "PSNR",
    "codes in use",
)


def _cells(run: Run, record: Mapping[str, Any]) -> list[str]:
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
        ", ".join([f"{curve.knob} {run.value}", *of_quantizer]),
        str(run.seed),
        str(run.epochs),
        f"{evaluation['coded_bits_per_vector']:.3f}",
        f"{evaluation['context_coded_bits_per_vector']:.3f}",
        f"{evaluation['coded_bits_per_pixel']:.3f}",
        f"{evaluation['reconstruction_loss']:.5f}",
        f"{evaluation['psnr']:.2f}",
        codes,
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


def _lattice_cells(run: Run, record: Mapping[str, Any]) -> list[str]:
    evaluation = record["evaluation"]
    active, bits = evaluation["active_dimensions"], evaluation["coded_bits_per_vector"]
    lattice = getattr(QUANTIZERS[CURVES[run.curve].quantizer], "lattice", None)
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


def _plot(records: Mapping[Run, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Lattices with a rate in the loss have dashes and squares, the others lines and circles."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    others = [name for name in CURVES if name not in LATTICES]
    for names, style in ((others, "o-"), (LATTICES, "s--")):
        for i, name in enumerate(names):
            found = [records[run]["evaluation"] for run in _evaluated(_first(name), records)]
            found.sort(key=lambda evaluation: evaluation["coded_bits_per_pixel"])
            rates = [evaluation["coded_bits_per_pixel"] for evaluation in found]
            for ax, figure_name in zip(axes, ("reconstruction_loss", "psnr"), strict=True):
                values = [evaluation[figure_name] for evaluation in found]
                ax.plot(rates, values, style, color=f"C{i}", label=name if found else None)
    axes[0].set(title="test MSE", xlabel="coded bits per pixel", yscale="log")
    axes[1].set(title="PSNR, dB", xlabel="coded bits per pixel")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


_HEADER = """# Quantizers at equal coded bits

`python -m results.compare` wrote this page; do not edit it by hand. Each run trains FashionMNIST's
network for three epochs with the schedule of the recipe `long`. Coded bits are the size of the test
split's codes as one file, each coded by how often it occurs in the training split (order 0); "with
contexts", its neighbours predict it. `vq_restarts` and `vq_ema_restarts` are `vq` and `vq_ema`
with dead codes restarted and the codebook initialised from the first batch.

Most runs were trained on CPUs. These were trained on a GPU, in float32: `vq` with 64 vectors or
more, `lfq` with up to 64 codes, `multirate_lattice`, and `d4_lattice` at the two largest λ. `lfq`
with more codes, `learned_lattice` at the three largest λ and `leech_lattice` were trained on both.
"""

_BD_RATE = """## Bits against the best VQ and two others

Bjøntegaard's delta rate at equal PSNR, without the points that take more bits than another one of
their curve for no more PSNR. It is empty where a curve is not finished, or where the two curves
share no range of PSNR.
"""


_LATTICES_TEXT = """\
The rate is that of the points of the test images. It is exact for `diagonal_lattice`: a stream
coded by the density takes as many bits, or less where rare codes are escaped, because counts code
those. For the other lattices the rate is the density times a cell's volume, whose sum over all
points need not be 1; where it is more, the stream's tables are scaled down. The error's second
moment is per dimension, divided by the cell's volume to the power of 2/n; the lattice's own is that
of errors spread evenly over a cell.
"""


def write(records: Mapping[Run, Mapping[str, Any]]) -> None:
    """Writes the page and the plot."""

    def table(runs: Sequence[Run]) -> str:
        cells = [_cells(run, records[run]) for run in _evaluated(runs, records)]
        return markdown_table(_COLUMNS, cells)

    def lattices() -> str:
        runs = [run for run in (*FIRST, *further(records)) if run.curve in LATTICES]
        return markdown_table(
            _LATTICE_COLUMNS,
            [_lattice_cells(run, records[run]) for run in _evaluated(runs, records)],
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
    parser = argparse.ArgumentParser(
        prog="results.compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--workdirs", type=pathlib.Path, default=pathlib.Path("runs/compare"))
    parser.add_argument("--only", nargs="+", choices=list(CURVES), help="run only these curves")
    parser.add_argument("--trials", action="store_true", help="run the trials instead")
    parser.add_argument("--write", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        if not options.write:
            _carry_out_all(options)
        runs = [*FIRST, *TRIALS]
        write(read([*runs, *further(read(runs))]))


def _carry_out_all(options: argparse.Namespace) -> None:
    data = input_pipeline.load("fashion_mnist")

    def carry_out(runs: Iterable[Run]) -> None:
        for run in runs:
            if run.curve in (options.only or CURVES):
                _carry_out_once(run, options.workdirs, data)

    if options.trials:
        carry_out(TRIALS)
    else:
        carry_out(FIRST)
        carry_out(further(read(FIRST)))


def _carry_out_once(run: Run, workdirs: pathlib.Path, data: Dataset) -> None:
    if run in read([run]):
        return
    print(run.name, flush=True)
    recorded.keep(run.record, recorded.train(run.config(), workdirs / run.name, data))


if __name__ == "__main__":
    main()
