"""What the pages of results share: cells of tables, plots, and the command line."""

import argparse
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from results.intervals import spread

Numbers = Mapping[str, tuple[str, str]]
"""Columns of a table by their titles: a number's name in an evaluation, and its format."""


def cells(
    evaluations: Iterable[Mapping[str, float]],
    numbers: Numbers,
    text: Callable[[Sequence[float], str], str] = spread,
) -> list[str]:
    """Makes the cells of one run, or of runs that differ in their seeds alone."""
    evaluations = list(evaluations)
    return [text([each[name] for each in evaluations], form) for name, form in numbers.values()]


def save_plot(figure: Figure, path: pathlib.Path, dpi: int) -> None:
    """Writes a figure without the version of Matplotlib, and closes it."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def make_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a study, like "results.compare", with this docstring."""
    parser = argparse.ArgumentParser(prog=program, description=(doc or "").splitlines()[0])
    default = pathlib.Path("runs", program.rpartition(".")[2])
    parser.add_argument("--workdirs", type=pathlib.Path, default=default, help="where to train")
    parser.add_argument("--write", action="store_true", help="only write the page, train nothing")
    return parser
