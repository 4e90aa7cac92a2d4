"""The runs of `results.compare`, and their comparison at equal coded bits."""

import math
import pathlib
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import bjontegaard
import numpy as np
from scipy.interpolate import PchipInterpolator

from configs import fashion_mnist
from llvq.config import TrainConfig, parse
from results.curves import CURVES, LATTICES, in_name
from results.recorded import Record, evaluated

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
        changes = "".join(f"_{value}" for _, value in self.changes)
        return f"{self.curve}/{in_name(self.value)}{changes}_{self.epochs}_epochs_seed_{self.seed}"

    @property
    def record(self) -> pathlib.Path:
        """The file of the run's record."""
        return DIRECTORY / f"{self.name}.json"

    def config(self) -> TrainConfig:
        """Returns the run's config: the schedule of `standard`, in the paper's network."""
        curve = CURVES[self.curve]
        config = curve.at(self.value, fashion_mnist.get_config(curve.quantizer))
        config.seed, config.num_epochs, config.schedule = self.seed, self.epochs, "cosine"
        config.eval_every_steps = _STEPS_PER_EPOCH
        config.update_from_flattened_dict(dict(self.changes))
        return parse(config)


BASELINE = "vq_ema_restarts"

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
        for curve, weight in product(("lfq", "bsq"), _ENTROPY_WEIGHTS)
    ),
    *(_trial_of_latents(curve, *tried) for curve, several in _TRIED.items() for tried in several),
    Run("e8_lattice", 2.5e-4, changes=(("quantizer.training", "mixed"),)),
]
FIRST = [Run(name, value) for name, curve in CURVES.items() for value in curve.values]
RUNS = [*FIRST, *TRIALS]


def first_of(name: str) -> list[Run]:
    """Returns the first runs of a curve."""
    return [run for run in FIRST if run.curve == name]


def rate(record: Record) -> float:
    """Returns coded bits per pixel."""
    return record["evaluation"]["coded_bits_per_pixel"]


def psnr(record: Record) -> float:
    """Returns PSNR over the test images, in dB."""
    return record["evaluation"]["psnr"]


def curve_of(name: str, records: Mapping[Run, Record]) -> list[tuple[float, float]]:
    """Returns (rate, PSNR) of a curve's first runs, ascending, where more bits give more PSNR."""
    runs = evaluated(first_of(name), records)
    curve: list[tuple[float, float]] = []
    for point in sorted((rate(records[run]), psnr(records[run])) for run in runs):
        if not curve or point[1] > curve[-1][1]:
            curve.append(point)
    return curve


def bd_rate(name: str, records: Mapping[Run, Record], anchor: str = BASELINE) -> float | None:
    """Computes how many percent more bits a curve takes than another at equal PSNR, on average.

    Bjøntegaard's delta rate, with piecewise cubic interpolation, over the PSNR that both curves
    reach. None if a curve is not finished, or if they do not overlap.
    """
    if any(run not in records for run in (*first_of(name), *first_of(anchor))):
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


def gain(run: Run, records: Mapping[Run, Record]) -> float | None:
    """Computes how many dB a run's PSNR is above the baseline's curve at the run's rate.

    The curve's PSNR is interpolated over the logarithm of its rate, as by `bd_rate`. None beyond
    the curve's rates.
    """
    rates, psnrs = zip(*curve_of(BASELINE, records), strict=True)
    of_run = records[run]
    if not rates[0] <= rate(of_run) <= rates[-1]:
        return None
    return psnr(of_run) - float(PchipInterpolator(np.log(rates), psnrs)(np.log(rate(of_run))))


def nearest(name: str, records: Mapping[Run, Record]) -> Run:
    """Returns the first run of a curve whose coded bits per vector are nearest to 5."""
    runs = evaluated(first_of(name), records)
    per_vector = "coded_bits_per_vector"
    return min(runs, key=lambda run: abs(records[run]["evaluation"][per_vector] - 5.0))


def further(records: Mapping[Run, Record]) -> list[Run]:
    """Returns what follows the first runs: more seeds for six curves, ten epochs for three."""
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
