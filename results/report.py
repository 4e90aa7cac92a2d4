"""Writes results/README.md and its plots from the runs that results/collect.py has kept."""

import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import sweep
from benchmarks.store import Row
from llvq.evaluation.metrics import METRICS
from llvq.quantizers import QUANTIZERS
from llvq.runtime.console import markdown_table
from results import pages
from results.intervals import spread

DIRECTORY = pathlib.Path(__file__).parent

Run = dict[str, Any]
Group = tuple[str, str]  # data set and recipe

_HEADER = """# Results

`python -m results.collect` wrote this page; do not edit it by hand. Every figure that is not in
brackets comes from a run of this project, whose numbers and curves are in [runs](runs). Figures in
brackets are the authors', whose models were trained with the recipe `paper`. {source}

Figures are means ± standard deviations over the seeds named. MSE, PSNR and SSIM are over the test
split (FFHQ: validation), PSNR and SSIM on values mapped to [0, 1] and clipped; codebook figures are
over all training and validation images; an estimate (≈) comes with its standard error.

Coded bits are the size of a file that decodes: the codes of the whole test split as one stream,
each coded by how often it occurs in the training split (order 0). "With the tables" adds these
counts, and "with contexts" lets a code's neighbours predict it. The plug-in entropy is no rate:
over N vectors it cannot exceed log₂ N, and it is near that bound where most codes occur once.
"""

# The figures of evaluation.json that say what the codes cost, and their columns.
_RATES = {
    "coded_bits_per_vector": "coded bits per vector",
    "coded_bits_per_vector_with_tables": "with the tables",
    "context_coded_bits_per_vector": "coded with contexts",
    "coded_bits_per_pixel": "coded bits per pixel",
    "plug_in_entropy_bits_per_vector": "plug-in entropy, bits per vector",
}

_COLUMNS = (
    "quantizer",
    "seeds",
    *(metric.title for metric in METRICS.values()),
    "effective codebook size",
    "vectors",
    *_RATES.values(),
    "quantizer's parameters",
    "training images/s",
)


def read_runs(results: pathlib.Path) -> dict[Group, dict[str, list[Run]]]:
    """Reads the runs kept, by data set and recipe, then by quantizer, ordered by their seeds."""
    groups: dict[Group, dict[str, list[Run]]] = {}
    for path in sorted((results / "runs").rglob("seed_*.json")):
        run = json.loads(path.read_text())
        evaluation = run["evaluation"]
        evaluation.setdefault("mse", evaluation["reconstruction_loss"])  # of an older version
        group = run["evaluation"]["dataset"], run["recipe"]
        groups.setdefault(group, {}).setdefault(run["evaluation"]["quantizer"], []).append(run)
    for runs in groups.values():
        for same in runs.values():
            same.sort(key=lambda run: run["seed"])
    return groups


def _cells(quantizer: str, runs: list[Run], published: Mapping[str, float]) -> list[str]:
    def figure(name: str, digits: str) -> str:
        if any(run["evaluation"].get(name) is None for run in runs):
            return ""  # evaluated by an older version, or not finite
        text = spread([run["evaluation"][name] for run in runs], digits)
        return f"{text} ({published[name]:{digits}})" if name in published else text

    size = figure("effective_codebook_size", ",.0f")
    if not all(run["evaluation"]["effective_codebook_size_is_exact"] for run in runs):
        error = max(run["evaluation"]["effective_codebook_size_relative_error"] for run in runs)
        size = f"≈ {size}, each within {error:.2%}"
    rates = [run["training_images_per_second"] for run in runs]
    first = runs[0]
    cells = [f"`{quantizer}`", ", ".join(str(run["seed"]) for run in runs)]
    cells += [figure(name, metric.digits) for name, metric in METRICS.items()]
    vectors = f"{first['evaluation']['num_quantized_vectors']:,}"
    if "num_quantized_vectors" in published:
        vectors += f" ({published['num_quantized_vectors']:,.0f})"
    cells += [size, vectors]
    cells += [figure(name, ".3f") for name in _RATES]
    return [
        *cells,
        f"{first['quantizer_parameters']:,}",
        spread(rates, ".0f") if all(rates) else "",
    ]


def _curves(
    axes: Axes, runs: Mapping[str, list[Run]], name: str, title: str, *, log: bool = True
) -> None:
    """Plots a line for each seed, a colour for each quantizer."""
    for i, (quantizer, same) in enumerate(runs.items()):
        for j, run in enumerate(same):
            points = run["curves"].get(name, [])
            label = None if j else quantizer
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, linewidth=1)
    axes.set(title=title, xlabel="training step", yscale="log" if log else "linear")
    axes.legend()


def _save_plot(path: pathlib.Path, *draws: Callable[[Axes], None]) -> None:
    """Writes plots side by side."""
    size = 5 * len(draws), 4
    figure, (row,) = plt.subplots(1, len(draws), figsize=size, layout="constrained", squeeze=False)
    for draw, axes in zip(draws, row, strict=True):
        draw(axes)
    pages.save_plot(figure, path, dpi=100)


def _section(
    results: pathlib.Path,
    group: Group,
    runs: Mapping[str, list[Run]],
    published: Mapping[str, Any],
) -> str:
    dataset, recipe = group
    directory = results / "runs" / dataset / recipe
    plot = directory / "training.png"

    _save_plot(
        plot,
        lambda axes: _curves(
            axes, runs, "train/reconstruction_loss", "reconstruction loss, training"
        ),
        lambda axes: _curves(
            axes, runs, "train/distinct_codes", "distinct codes per batch, training"
        ),
    )
    machines = sorted({run["machine"] for same in runs.values() for run in same})
    seeds = sorted({run["seed"] for same in runs.values() for run in same})
    options = f"--recipe={recipe} --seeds={','.join(map(str, seeds))}"
    lines = [
        f"## {dataset}, recipe `{recipe}`\n",
        f"    ./run.sh {options} {dataset} {' '.join(runs)}\n",
        f"Trained on: {'; '.join(machines)}.\n",
        markdown_table(
            _COLUMNS,
            [_cells(name, same, published.get(name, {})) for name, same in runs.items()],
        ),
        f"\n![{dataset}: loss and codes in use over training]({plot.relative_to(results)})",
    ]
    for quantizer, same in runs.items():
        seed = same[0]["seed"]
        picture = directory / quantizer / f"seed_{seed}.png"
        lines.append(f"\n`{quantizer}`, seed {seed}: originals above reconstructions\n")
        lines.append(f"![{quantizer}]({picture.relative_to(results)})")
    return "\n".join(lines)


def _read_sweeps(results: pathlib.Path) -> list[Row]:
    """Reads the rows of benchmarks/sweep.py from the machine that it ran on last."""
    source = results / "benchmarks.json"
    rows = json.loads(source.read_text()) if source.exists() else []
    rows = [row for row in rows if row["program"] == sweep.PROGRAM]
    return [row for row in rows if row["machine"] == rows[-1]["machine"]]


def _sweep_table(varied: str, rows: Sequence[Row]) -> str:
    quantizers = list(rows[0]["seconds"])
    has_parameters = varied == sweep.CODEBOOK_SIZE
    header = [varied]
    for quantizer in quantizers:
        header.append(f"{quantizer}, ms per step")
        header += ["its parameters"] if has_parameters else []
    lines = []
    for row in rows:
        value = row["setting"]["value"]
        line = [f"{value:,}"]
        for quantizer in quantizers:
            line.append(f"{float(f'{_milliseconds(row, quantizer):.3g}'):,g}")
            if has_parameters:
                line.append(f"{sweep.num_parameters(quantizer, value):,}")
        lines.append(line)
    return markdown_table(header, lines)


def _milliseconds(row: Row, quantizer: str) -> float:
    return 1e3 * statistics.median(row["seconds"][quantizer])


def _sweep_section(results: pathlib.Path) -> str:
    """Writes about the time of a training step against what it depends on, if it was measured."""
    all_rows = _read_sweeps(results)
    if not all_rows:
        return ""
    sweeps: dict[str, list[Row]] = {}
    for row in all_rows:
        sweeps.setdefault(row["setting"]["varied"], []).append(row)

    def draw(axes: Axes, varied: str, title: str, figure: Callable[[Row, str], float]) -> None:
        values = [row["setting"]["value"] for row in sweeps[varied]]
        for quantizer in sweeps[varied][0]["seconds"]:
            heights = [figure(row, quantizer) for row in sweeps[varied]]
            axes.plot(values, heights, marker="o", label=quantizer)
        axes.set(title=title, xlabel=varied, xscale="log", yscale="log")
        axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend()

    def parameters(row: Row, quantizer: str) -> float:
        return sweep.num_parameters(quantizer, row["setting"]["value"])

    title = "time of a training step, ms"
    draws = [
        functools.partial(draw, varied=varied, title=title, figure=_milliseconds)
        for varied in sweeps
    ]
    if sweep.CODEBOOK_SIZE in sweeps:
        title = "parameters of the quantizer"
        draws.append(
            functools.partial(draw, varied=sweep.CODEBOOK_SIZE, title=title, figure=parameters)
        )
    plot = results / "sweep.png"
    _save_plot(plot, *draws)
    last = all_rows[-1]
    return "\n".join(
        (
            "## Cost against codebook, batch and image size\n",
            f"FashionMNIST's network on {last['machine']}, with a codebook of 512 and steps of 64 "
            "images of 28×28 (8 images per step where their size varies):\n",
            f"    {last['command']}\n",
            "\n\n".join(_sweep_table(varied, rows) for varied, rows in sweeps.items()),
            f"\n![time of a step and number of parameters]({plot.name})",
        )
    )


def write(results: pathlib.Path) -> None:
    """Writes README.md and the plots from the runs in a directory like results/."""
    published = json.loads((results / "published.json").read_text())
    sections = [_HEADER.format(source=published["source"])]
    for group, runs in read_runs(results).items():
        ordered = {name: runs[name] for name in QUANTIZERS if name in runs}
        sections.append(_section(results, group, ordered, published.get(group[0], {})))
    sections.append(_sweep_section(results))
    (results / "README.md").write_text("\n\n".join(filter(None, sections)).strip() + "\n")
