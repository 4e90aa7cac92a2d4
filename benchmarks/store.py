"""The rows that a benchmark keeps in a JSON file, and the page beside it."""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from benchmarks import measure
from llvq.data.files import writing
from llvq.errors import UserError, first_line
from llvq.runtime import sharding

Row = dict[str, Any]
Page = Callable[[list[Row]], str]
"""Makes Markdown of all rows."""

_SOURCE = ("program", "machine", "versions", "command")
_T = TypeVar("_T")


class Store:
    """Rows in a JSON file, or only in memory if there is no file.

    Attributes:
      rows: all of them, the newest last.
    """

    def __init__(
        self,
        output: pathlib.Path | None,
        page: Page,
        identity: Sequence[str] = ("program", "machine", "setting"),
    ) -> None:
        """Reads the rows that earlier runs have kept.

        Args:
          output: the file; its name ends in .json.
          page: makes the page that is written beside the file.
          identity: the entries that tell one case from another.

        Raises:
          UserError: if the file cannot be used.
        """
        self._output, self._page, self._identity = output, page, identity
        self.rows: list[Row] = self._read(output) if output else []

    def _read(self, output: pathlib.Path) -> list[Row]:
        if output.suffix != ".json":
            raise UserError(f"--output={output}: must end in .json; a table is written beside it")
        if not output.parent.is_dir():
            raise UserError(f"--output={output}: there is no directory {output.parent}")
        if not output.exists():
            return []
        try:
            rows: list[Row] = json.loads(output.read_text())
            self._page(rows)
            list(map(self._key, rows))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"--output={output} exists and is not of this program") from error
        except OSError as error:
            raise UserError(f"--output={output} cannot be read: {first_line(error)}") from error
        return rows

    def find(self, case: Row) -> Row | None:
        """Returns the row of a case, or None."""
        return next((row for row in self.rows if self._key(row) == self._key(case)), None)

    def add(self, *rows: Row) -> None:
        """Adds rows in place of those of the same cases, and writes the file and the page.

        Raises:
          UserError: if they cannot be written.
        """
        new = list(map(self._key, rows))
        self.rows = [*(row for row in self.rows if self._key(row) not in new), *rows]
        if self._output:
            with writing(self._output) as file:
                file.write_text(json.dumps(self.rows, indent=1) + "\n")
            with writing(self._output.with_suffix(".md")) as file:
                file.write_text(self._page(self.rows))

    def _key(self, row: Row) -> list[Any]:
        return [row[name] for name in self._identity]


def progress(cases: Sequence[_T], name: Callable[[_T], str]) -> Iterator[_T]:
    """Yields cases, and prints to stderr which one is next and how long the others will take."""
    start = time.monotonic()
    for number, case in enumerate(cases):
        left = ""
        if number:
            seconds = (time.monotonic() - start) / number * (len(cases) - number)
            left = f", {seconds / 60:.0f} min left"
        print(f"{number + 1}/{len(cases)}{left}: {name(case)}", file=sys.stderr, flush=True)
        yield case


def words(setting: Row) -> str:
    """Names a case in `progress` by its values."""
    return " ".join(map(str, setting.values()))


def source(program: str, *packages: str) -> Row:
    """Returns where this process's numbers come from: what `by_source` groups rows by.

    Args:
      program: e.g. "train_step.py".
      packages: whose versions matter.
    """
    machine = sharding.describe(sharding.make_mesh(jax.devices()[:1]))
    values = program, machine, measure.versions(*packages), " ".join(["python", *sys.argv])
    return dict(zip(_SOURCE, values, strict=True))


def by_source(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Yields (source, rows) of each command on each machine, in the order of their first rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SOURCE), []).append(row)
    for values, group in groups.items():
        yield dict(zip(_SOURCE, values, strict=True)), group


def number(value: float, digits: int = 4) -> str:
    """Formats a number with `digits` significant digits, and commas instead of an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def make_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a program with this docstring, which may keep its rows in a file."""
    parser = argparse.ArgumentParser(prog=program, description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file to keep the numbers in")
    return parser


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless the options of these names, numbers or lists, are above 0."""
    for name in names:
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
