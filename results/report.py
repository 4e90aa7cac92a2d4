"""Writes results/README.md and its plots from what results/collect.py has kept."""

import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DIRECTORY = pathlib.Path(__file__).parent

Run = dict[str, Any]
Group = tuple[str, str]  # data set and recipe

_HEADER = """# Results

Written by `python -m results.collect`; not to be edited by hand. Every figure comes from a run of
this project; its numbers and curves are in [runs](runs).

Mean ± standard deviation over the seeds named. MSE, PSNR and SSIM are over the test split (FFHQ:
validation), PSNR and SSIM on values mapped to [0, 1] and clipped; codebook figures over all
training and validation images; an estimate (≈) comes with its standard error. In brackets the
authors' figures. {source}
"""

_COLUMNS = (
    *("quantizer", "seeds", "MSE", "PSNR", "SSIM", "effective codebook size", "vectors"),
    *("entropy, bits a vector", "bits a pixel", "quantizer's parameters", "training images/s"),
)


def read_runs(results: pathlib.Path) -> dict[Group, dict[str, list[Run]]]:
    """The runs kept, by data set and recipe, then by quantizer, in the order of their seeds."""
    groups: dict[Group, dict[str, list[Run]]] = {}
    for path in sorted((results / "runs").rglob("seed_*.json")):
        run = json.loads(path.read_text())
        group = run["evaluation"]["dataset"], run["recipe"]
        groups.setdefault(group, {}).setdefault(run["evaluation"]["quantizer"], []).append(run)
    for runs in groups.values():
        for of_quantizer in runs.values():
            of_quantizer.sort(key=lambda run: run["seed"])
    return groups


def spread(values: Iterable[float], digits: str) -> str:
    """Mean ± standard deviation (of a sample), or the value if there is one."""
    values = list(values)
    mean = f"{statistics.mean(values):{digits}}"
    return f"{mean} ± {statistics.stdev(values):{digits}}" if len(values) > 1 else mean


def _row(quantizer: str, runs: list[Run], published: Mapping[str, float]) -> str:
    def figure(name: str, digits: str) -> str:
        return spread((run["evaluation"][name] for run in runs), digits)

    def beside(text: str, name: str, digits: str) -> str:
        return f"{text} ({published[name]:{digits}})" if name in published else text

    rates = [run["training_images_per_second"] for run in runs]
    size = beside(figure("effective_codebook_size", ",.0f"), "effective_codebook_size", ",.0f")
    if not all(run["evaluation"]["effective_codebook_size_is_exact"] for run in runs):
        error = max(run["evaluation"]["effective_codebook_size_relative_error"] for run in runs)
        size = f"≈ {size}, each within {error:.2%}"
    cells = (
        f"`{quantizer}`",
        ", ".join(str(run["seed"]) for run in runs),
        beside(figure("reconstruction_loss", ".5f"), "reconstruction_loss", ".5f"),
        figure("psnr", ".2f"),
        figure("ssim", ".3f"),
        size,
        beside(
            f"{runs[0]['evaluation']['num_quantized_vectors']:,}", "num_quantized_vectors", ",.0f"
        ),
        figure("entropy_bits_per_vector", ".2f"),
        figure("bits_per_pixel", ".3f"),
        f"{runs[0]['quantizer_parameters']:,}",
        spread(rates, ".0f") if all(rates) else "",
    )
    return f"| {' | '.join(cells)} |"


def _curves(
    axes: Axes, runs: Mapping[str, list[Run]], name: str, title: str, *, log: bool = True
) -> None:
    """A line for each seed, a colour for each quantizer."""
    for i, (quantizer, of_quantizer) in enumerate(runs.items()):
        for j, run in enumerate(of_quantizer):
            points = run["curves"].get(name, [])
            label = None if j else quantizer
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, linewidth=1)
    axes.set(title=title, xlabel="training step", yscale="log" if log else "linear")
    axes.legend()


def _save_plot(path: pathlib.Path, *draws: Callable[[Axes], None]) -> None:
    """Plots side by side."""
    size = 5 * len(draws), 4
    figure, (row,) = plt.subplots(1, len(draws), figsize=size, layout="constrained", squeeze=False)
    for draw, axes in zip(draws, row, strict=True):
        draw(axes)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


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
            axes, runs, "train/distinct_codes", "distinct codes in a batch, training"
        ),
    )
    machines = sorted({run["machine"] for of_quantizer in runs.values() for run in of_quantizer})
    seeds = sorted({run["seed"] for of_quantizer in runs.values() for run in of_quantizer})
    options = f"--recipe={recipe} --seeds={','.join(map(str, seeds))}"
    lines = [
        f"## {dataset}, recipe `{recipe}`\n",
        f"    ./run.sh {options} {dataset} {' '.join(runs)}\n",
        f"Trained on: {'; '.join(machines)}.\n",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_row(name, of_name, published.get(name, {})) for name, of_name in runs.items()),
        f"\n![{dataset}: loss and codes in use over training]({plot.relative_to(results)})",
    ]
    for quantizer, of_quantizer in runs.items():
        seed = of_quantizer[0]["seed"]
        picture = directory / quantizer / f"seed_{seed}.png"
        lines.append(f"\n`{quantizer}`, seed {seed}: originals above reconstructions\n")
        lines.append(f"![{quantizer}]({picture.relative_to(results)})")
    return "\n".join(lines)


def _sweep_section(results: pathlib.Path) -> str:
    """Time of a training step against what it depends on, if it has been measured."""
    source = results / "sweep.json"
    if not source.exists():
        return ""
    measured = json.loads(source.read_text())
    plot = results / "sweep.png"

    def draw(axes: Axes, name: str, what: str, title: str) -> None:
        sweep = measured["sweeps"][name]
        for quantizer, values in sweep[what].items():
            axes.plot(sweep["values"], values, marker="o", label=quantizer)
        axes.set(title=title, xlabel=name, xscale="log", yscale="log")
        axes.set_xticks(sweep["values"], [f"{value:,}" for value in sweep["values"]], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend()

    title = "time of a training step, ms"
    draws = [
        functools.partial(draw, name=name, what="milliseconds", title=title)
        for name in measured["sweeps"]
    ]
    first, *_ = measured["sweeps"]
    title = "parameters of the quantizer"
    _save_plot(plot, *draws, functools.partial(draw, name=first, what="parameters", title=title))
    return "\n".join(
        (
            "## Cost against codebook, batch and image size\n",
            f"FashionMNIST's network on {measured['machine']}; what is not varied is 512, 64 (8 "
            "where the images vary) and 28×28:\n",
            f"    {measured['command']}\n",
            "\n\n".join(sweep["table"] for sweep in measured["sweeps"].values()),
            f"\n![time of a step and number of parameters]({plot.name})",
        )
    )


def write(results: pathlib.Path) -> None:
    """Writes README.md and the plots from the runs in a directory like results/."""
    published = json.loads((results / "published.json").read_text())
    sections = [_HEADER.format(source=published["source"])]
    for group, runs in read_runs(results).items():
        order = sorted(runs, key=["vq", "vq_ema", "sparse_lattice", "dense_lattice"].index)
        sections.append(
            _section(
                results, group, {name: runs[name] for name in order}, published.get(group[0], {})
            )
        )
    sections.append(_sweep_section(results))
    (results / "README.md").write_text("\n\n".join(filter(None, sections)).strip() + "\n")
