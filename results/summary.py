"""Prints a table of evaluated runs, and where their pictures and checkpoints are.

    python -m results.summary runs/fashion_mnist/paper/vq/seed_0 …

The workdirs must be named DATA SET/RECIPE/QUANTIZER/seed_SEED, as run.sh names them.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from llvq import checkpointing
from llvq.errors import UserError, one_line_exit
from llvq.evaluate import read_evaluation
from llvq.evaluation.metrics import METRICS
from llvq.runtime.console import markdown_table

_COLUMNS = (
    "data set",
    "recipe",
    "quantizer",
    "seed",
    "split",
    *(metric.title for metric in METRICS.values()),
    "codes in use",
    "coded bits per vector",
)

_FOOTER = """
reconstructions.png (originals above reconstructions) and the directory checkpoints are in:

{workdirs}

TensorBoard: .venv/bin/tensorboard --logdir={root}"""


def cells(workdir: pathlib.Path) -> list[str]:
    """Makes a run's row of the table.

    Raises:
      UserError: if its newest checkpoint is not evaluated, or its workdir has another name.
    """
    *_, dataset, recipe, quantizer, seed = ("", "", "", *workdir.parts)
    if not dataset or not seed.startswith("seed_"):
        raise UserError(f"{workdir}: must end in DATA SET/RECIPE/QUANTIZER/seed_SEED")
    evaluation = read_evaluation(workdir, checkpointing.load(workdir).path)
    codes = f"{evaluation['effective_codebook_size']:,}"
    bits = evaluation.get("coded_bits_per_vector")
    is_exact = evaluation["effective_codebook_size_is_exact"]
    return [
        dataset,
        recipe,
        quantizer,
        seed.removeprefix("seed_"),
        evaluation["split"],
        *(metric.text(evaluation.get(name)) for name, metric in METRICS.items()),
        codes if is_exact else f"≈ {codes}",
        "" if bits is None else f"{bits:.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="results.summary", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    workdirs = parser.parse_args(arguments).workdirs
    with one_line_exit(parser.prog):
        print(markdown_table(_COLUMNS, map(cells, workdirs), aligned=True))
    names = "\n".join(f"    {workdir}" for workdir in workdirs)
    print(_FOOTER.format(workdirs=names, root=os.path.commonpath(workdirs)))


if __name__ == "__main__":
    main()
