"""Trains and measures models of real colour images, and writes results/photos.md.

    python -m results.photos [--only photographs faces] [--write] [--workdirs=runs/photos]

The images of a task are a folder in one of `--sources`, with sub-folders train, validation and
test. A model is trained through the data set `image_folder` and evaluated. Then it compresses whole
test photographs, one file each, beside JPEG and WebP files of the nearest size. One record is kept
for each finished run; a run that was stopped is resumed. What is missing is named at the end.
"""

import argparse
import pathlib
from collections.abc import Sequence

from llvq.errors import UserError, one_line_exit
from llvq.runtime.console import markdown_table
from results import pages
from results.curves import CURVES
from results.photo_runs import DIRECTORY, RUNS, TASKS, Run, carry_out, first_of, picture_of
from results.recorded import Record, evaluated, keep, missing, read

_HEADER = """# Models of photographs and faces

`python -m results.photos` wrote this page; do not edit it by hand. Each model is trained through
the data set `image_folder`, with the schedule `cosine`, and the latents of
[compare.md](compare.md). Coded bits are the size of files: over the test split at the training size
as one stream of order 0, and over whole test photographs as one file each. JPEG and WebP (Pillow)
have for each photograph the quality whose file has the nearest size. MS-SSIM is by TensorFlow.
Where a setting has several seeds, figures are means ± standard deviations over them.

Most models were trained on CPUs. These were trained on a GPU, in float32: with FFHQ's network on
BSDS500 and seed 2, `e8_lattice`, `residual_vq` and the others with more than 512 codes; with
CelebA's network, both; and at full size, the first 342 of 520 steps.
"""

_NUMBERS = {
    "coded bits per vector": ("coded_bits_per_vector", ".3f"),
    "coded bits per pixel": ("coded_bits_per_pixel", ".3f"),
    "test MSE": ("reconstruction_loss", ".5f"),
    "PSNR": ("psnr", ".2f"),
    "SSIM": ("ssim", ".3f"),
    "codes in use": ("effective_codebook_size", ",.0f"),
}
_WHOLE_NUMBERS = {
    "coded bits per pixel": ("coded_bits_per_pixel", ".3f"),
    "PSNR": ("psnr", ".2f"),
    "SSIM": ("ssim", ".3f"),
    "MS-SSIM": ("ms_ssim", ".3f"),
}
_NAMES = ("quantizer", "setting", "seeds")


def _name_cells(runs: Sequence[Run]) -> list[str]:
    curve = CURVES[runs[0].curve]
    seeds = ", ".join(str(run.seed) for run in runs)
    return [
        f"`{runs[0].curve}`",
        curve.setting(runs[0].value),
        "the authors' weights for FFHQ" if runs[0].weights else seeds,
    ]


def _cells(records: dict[Run, Record]) -> list[str]:
    """Makes a row for runs that differ in their seeds alone."""
    evaluations = (record["evaluation"] for record in records.values())
    return [*_name_cells(list(records)), *pages.cells(evaluations, _NUMBERS)]


def _whole_cells(records: dict[Run, Record]) -> list[list[str]]:
    """Makes the rows of their files, one for each format."""
    files = next(iter(records.values()))["photographs"]
    return [
        [
            *(_name_cells(list(records)) if i == 0 else [""] * 3),
            file,
            *pages.cells((each["photographs"][file] for each in records.values()), _WHOLE_NUMBERS),
        ]
        for i, file in enumerate(files)
    ]


def _shown(task: str, shown: Record) -> str:
    sizes = [f"{name} {num_bytes:,}" for name, num_bytes in shown["bytes"].items()]
    return (
        f"The centre of `{shown['name']}` at 1:1: the original beside `{first_of(task).curve}`, "
        f"above JPEG and WebP. Bytes of the whole photograph: {', '.join(sizes)}.\n\n"
        f"![{shown['name']}]({DIRECTORY.name}/{picture_of(task).name})\n"
    )


def write(records: dict[Run, Record]) -> None:
    """Writes the page."""
    parts = [_HEADER]
    for name, task in TASKS.items():
        settings: dict[Run, dict[Run, Record]] = {}  # by the run with seed 0
        for run, record in records.items():
            if run.task == name:
                settings.setdefault(run._replace(seed=0), {})[run] = record
        if not settings:
            continue
        parts.append(f"## {task.title}\n")
        parts.append(
            f"{task.num_epochs} epochs of {task.size}×{task.size} images (`{task.fit}`), "
            f"{task.batch_size} at a time.\n"
        )
        parts.append(
            markdown_table((*_NAMES, *_NUMBERS), [_cells(same) for same in settings.values()])
            + "\n"
        )
        if task.whole:
            rows = [cells for same in settings.values() for cells in _whole_cells(same)]
            parts.append("Whole test photographs:\n")
            parts.append(markdown_table((*_NAMES, "file", *_WHOLE_NUMBERS), rows) + "\n")
            if first := records.get(first_of(name)):
                parts.append(_shown(name, first["shown"]))
    (DIRECTORY.parent / "photos.md").write_text("\n".join(parts))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = pages.make_parser("results.photos", __doc__)
    parser.add_argument(
        "--sources",
        nargs="+",
        type=pathlib.Path,
        default=[pathlib.Path("runs")],
        help="the directories that hold the folders of images and the authors' weights",
    )
    parser.add_argument("--only", nargs="+", choices=list(TASKS), help="run only these tasks")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        lacking = [] if options.write else _carry_out_all(options)
        records = read(RUNS)
        write({run: records[run] for run in evaluated(RUNS, records)})
        if lacking:
            raise UserError(
                f"not found in {', '.join(map(str, options.sources))}: {', '.join(lacking)}; "
                "docs/data.md says where they come from, --sources names other directories"
            )


def _carry_out_all(options: argparse.Namespace) -> list[str]:
    """Carries out what has no record. Returns the names of files that it needs and lacks."""
    lacking: dict[str, None] = {}

    def find(name: str) -> pathlib.Path | None:
        for source in options.sources:
            if (source / name).exists():
                return source / name
        lacking[name] = None
        return None

    for run in missing(run for run in RUNS if run.task in (options.only or TASKS)):
        folders = [find(name) for name in TASKS[run.task].folders]
        weights = find(run.weights) if run.weights else None
        if None not in folders and (weights is None) == (not run.weights):
            found = list(filter(None, folders))
            keep(run, carry_out(run, found, weights, options.workdirs / run.name))
    return list(lacking)


if __name__ == "__main__":
    main()
