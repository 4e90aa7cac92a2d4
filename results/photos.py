"""Trains and measures models of real colour images, and writes results/photos.md.

    python -m results.photos [--only photographs faces] [--write] [--workdirs=runs/photos]

The images of a task are a folder in one of `--sources`, with sub-folders train, validation and
test. A model is trained through the data set `image_folder` and evaluated. Then it compresses whole
test photographs, one file each, beside JPEG and WebP files of the nearest size. One record is kept
for each finished run; a run that was stopped is resumed. What is missing is named at the end.
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

import input_pipeline
from configs import image_folder
from llvq import load_pretrained
from llvq.config import TrainConfig, parse
from llvq.data.image_files import SUFFIXES, find_files, read_image
from llvq.errors import UserError, one_line_exit
from llvq.evaluation.pictures import write_png
from llvq.import_torch import import_checkpoint
from llvq.runtime.console import markdown_table
from results import other_codecs, recorded
from results.curves import CURVES
from results.report import spread

DIRECTORY = pathlib.Path(__file__).parent / "photos"

Record = recorded.Record


class Task(NamedTuple):
    """Images and a network for them.

    Attributes:
      title: of its section.
      folders: of its images, with sub-folders train, validation and test.
      size: height and width of the images to train on.
      fit: how they come to that size.
      hidden_dims: of the network.
      batch_size: in training.
      num_epochs: likewise.
      whole: whether its test images are compressed as they are, and not only at `size`.
      shown: the name of the test image in the task's picture; "" is the first one.
    """

    title: str
    folders: tuple[str, ...]
    size: int = 64
    fit: str = "tiles"
    hidden_dims: tuple[int, ...] = (16, 32)
    batch_size: int = 64
    num_epochs: int = 20
    whole: bool = True
    shown: str = ""


class Run(NamedTuple):
    """A model: the quantizer of a curve of results.curves, with the value of its knob.

    `weights` names a file of the authors' program that is imported instead of training.
    """

    task: str
    curve: str
    value: Any
    seed: int = 2
    weights: str = ""

    @property
    def name(self) -> str:
        """The run's place in the directories of records and workdirs."""
        if self.weights:
            return f"{self.task}/authors_{self.curve}"
        value = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        return f"{self.task}/{self.curve}_{value}_seed_{self.seed}"

    @property
    def record(self) -> pathlib.Path:
        """The file of the finished run's figures."""
        return DIRECTORY / f"{self.name}.json"

    def config(self) -> TrainConfig:
        """The run's config, without the place of its images."""
        task, curve = TASKS[self.task], CURVES[self.curve]
        config = curve.at(self.value, image_folder.get_config(f"{curve.quantizer},long"))
        config.dataset.fit = task.fit
        config.model.image_shape = (task.size, task.size, 3)
        config.model.hidden_dims = task.hidden_dims
        config.batch_size, config.num_epochs = task.batch_size, task.num_epochs
        config.seed = self.seed
        return parse(config)


TASKS = {
    "photographs": Task("Photographs of BSDS500, FFHQ's network", ("bsds500",)),
    "photographs_celeba": Task(
        "Photographs of BSDS500, CelebA's network", ("bsds500",), hidden_dims=(64,)
    ),
    "faces": Task(
        "Faces of CelebA at 80×80, FFHQ's network",
        ("celeba_half",),
        size=80,
        fit="resize",
        whole=False,
    ),
    "full_size": Task(
        "Photographs of Debian in tiles of 1024×1024, FFHQ's network",
        ("debian_photos",),
        size=1024,
        batch_size=8,
        num_epochs=40,
    ),
    "shipped": Task(
        "The models that ship: photographs of BSDS500 and of Debian, FFHQ's network",
        ("bsds500", "debian_photos"),
        num_epochs=5,
        shown="life.jpg",
    ),
}

_AT_5_BITS = (
    ("e8_lattice", 2.5e-4),
    ("residual_vq", 2),
    ("sparse_lattice", 512),
    ("vq_restarts", 32),
    ("fsq", (8, 5)),
)
_AT_12_BITS = (
    ("e8_lattice", 5e-5),
    ("residual_vq", 3),
    ("sparse_lattice", 2**16),
    ("vq_restarts", 4096),
    ("fsq", (8, 8, 8, 6, 5)),
)

RUNS = [
    *(Run("photographs", *model) for model in (*_AT_5_BITS, *_AT_12_BITS)),
    *(
        Run("photographs", curve, value, seed)
        for curve, value in _AT_5_BITS[:2]
        for seed in (32, 432)
    ),
    *(Run("photographs_celeba", *model) for model in _AT_5_BITS[2:4]),
    *(Run("faces", *model) for model in _AT_5_BITS[2:]),
    Run("faces", "vq", 512, weights="ffhq1024/vq.ckpt"),
    Run("faces", "sparse_lattice", 512, weights="ffhq1024/sparse_lattice.ckpt"),
    Run("full_size", "sparse_lattice", 512),
    Run("shipped", "sparse_lattice", 512),
]


def _joined(folders: Sequence[pathlib.Path], directory: pathlib.Path) -> pathlib.Path:
    """A folder with the images of several, split by split."""
    if len(folders) == 1:
        return folders[0]
    for folder, split in itertools.product(folders, ("train", "validation", "test")):
        link = directory / split / folder.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # of an earlier run, whose folder may have moved
        link.symlink_to((folder / split).resolve(), target_is_directory=True)
    return directory


def carry_out(
    run: Run,
    folders: Sequence[pathlib.Path],
    weights: pathlib.Path | None,
    workdir: pathlib.Path,
) -> None:
    """Trains and measures a model, or goes on with it, and keeps its record.

    Args:
      run: of RUNS.
      folders: of its task.
      weights: a file of the authors' program to import instead, or None.
      workdir: of the model.
    """
    task, config = TASKS[run.task], run.config()
    images = _joined(folders, workdir.parent / "images")
    data = input_pipeline.load(
        "image_folder",
        manual_dir=str(images),
        image_shape=config.model.image_shape,
        fit=task.fit,
        flip=config.dataset.flip,
    )
    if weights is None:
        checkpoint, record = workdir, recorded.train(config, workdir, data)
    else:
        checkpoint = workdir / "imported"
        if not checkpoint.exists():
            import_checkpoint(weights, checkpoint, config.model.value_range)
        record = recorded.measure(config, workdir, data, checkpoint)
    if task.whole and "evaluation" in record:
        paths = sorted(find_files(epath.Path(images / "test"), SUFFIXES))
        photographs = [read_image(path, 3) for path in paths]
        model = load_pretrained(checkpoint)
        record["photographs"] = other_codecs.measure(model, photographs)
        if run == _first(run.task):
            names = [path.name for path in paths]
            index = names.index(task.shown) if task.shown else 0
            picture, num_bytes = other_codecs.compared(model, photographs[index])
            record["shown"] = {"name": names[index], "bytes": num_bytes}
            write_png(_picture(run.task), picture)
    recorded.keep(run.record, record)


def _picture(task: str) -> pathlib.Path:
    return DIRECTORY / f"{task}.png"


def _first(task: str) -> Run:
    return next(run for run in RUNS if run.task == task)


_HEADER = """# Models of photographs and faces

`python -m results.photos` wrote this page; do not edit it by hand. Each model is trained through
the data set `image_folder`, with the schedule of the recipe `long`, and the latents of
[compare.md](compare.md). Coded bits are the size of files: over the test split at the training size
as one stream of order 0, and over whole test photographs as one file each. JPEG and WebP (Pillow)
have for each photograph the quality whose file has the nearest size. MS-SSIM is by TensorFlow.
Where a setting has several seeds, figures are means ± standard deviations over them.

On a GPU, in float32, were trained: with FFHQ's network on BSDS500 and seed 2, `e8_lattice`,
`residual_vq`, and the others with more than 512 codes; with CelebA's network both; at full size the
first 342 of 520 steps. The other models were trained on CPUs.
"""

_COLUMNS = (
    "quantizer",
    "setting",
    "seeds",
    "coded bits per vector",
    "coded bits per pixel",
    "test MSE",
    "PSNR",
    "SSIM",
    "codes in use",
)
_WHOLE_COLUMNS = (
    "quantizer",
    "setting",
    "seeds",
    "file",
    "coded bits per pixel",
    "PSNR",
    "SSIM",
    "MS-SSIM",
)


def _name_cells(runs: Sequence[Run]) -> list[str]:
    curve = CURVES[runs[0].curve]
    seeds = ", ".join(str(run.seed) for run in runs)
    return [
        f"`{runs[0].curve}`",
        f"{curve.knob} {runs[0].value}",
        "the authors' weights for FFHQ" if runs[0].weights else seeds,
    ]


def _cells(records: dict[Run, Record]) -> list[str]:
    """A row for runs that differ in their seeds alone."""

    def figure(name: str, digits: str) -> str:
        return spread((record["evaluation"][name] for record in records.values()), digits)

    return [
        *_name_cells(list(records)),
        figure("coded_bits_per_vector", ".3f"),
        figure("coded_bits_per_pixel", ".3f"),
        figure("reconstruction_loss", ".5f"),
        figure("psnr", ".2f"),
        figure("ssim", ".3f"),
        figure("effective_codebook_size", ",.0f"),
    ]


def _whole_cells(records: dict[Run, Record]) -> list[list[str]]:
    """The rows of their files, one for each format."""

    def figure(file: str, name: str, digits: str) -> str:
        return spread((record["photographs"][file][name] for record in records.values()), digits)

    files = next(iter(records.values()))["photographs"]
    return [
        [
            *(_name_cells(list(records)) if i == 0 else [""] * 3),
            file,
            figure(file, "coded_bits_per_pixel", ".3f"),
            figure(file, "psnr", ".2f"),
            figure(file, "ssim", ".3f"),
            figure(file, "ms_ssim", ".3f"),
        ]
        for i, file in enumerate(files)
    ]


def _shown(task: str, shown: Record) -> str:
    sizes = [f"{name} {num_bytes:,}" for name, num_bytes in shown["bytes"].items()]
    return (
        f"The centre of `{shown['name']}` at 1:1: the original beside `{_first(task).curve}`, "
        f"above JPEG and WebP. Bytes of the whole photograph: {', '.join(sizes)}.\n\n"
        f"![{shown['name']}]({DIRECTORY.name}/{_picture(task).name})\n"
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
        parts.append(markdown_table(_COLUMNS, [_cells(same) for same in settings.values()]) + "\n")
        if task.whole:
            rows = [cells for same in settings.values() for cells in _whole_cells(same)]
            parts.append("Whole test photographs:\n")
            parts.append(markdown_table(_WHOLE_COLUMNS, rows) + "\n")
            if first := records.get(_first(name)):
                parts.append(_shown(name, first["shown"]))
    (DIRECTORY.parent / "photos.md").write_text("\n".join(parts))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="results.photos", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--workdirs", type=pathlib.Path, default=pathlib.Path("runs/photos"))
    parser.add_argument(
        "--sources",
        nargs="+",
        type=pathlib.Path,
        default=[pathlib.Path("runs")],
        help="the directories that hold the folders of images and the authors' weights",
    )
    parser.add_argument("--only", nargs="+", choices=list(TASKS), help="run only these tasks")
    parser.add_argument("--write", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    with one_line_exit(parser.prog):
        missing = [] if options.write else _carry_out_all(options)
        records = {run: recorded.read(run.record, run.config()) for run in RUNS}
        write({run: record for run, record in records.items() if record and "evaluation" in record})
        if missing:
            raise UserError(
                f"not found in {', '.join(map(str, options.sources))}: {', '.join(missing)}; "
                "docs/data.md says where they come from, --sources names other directories"
            )


def _carry_out_all(options: argparse.Namespace) -> list[str]:
    """Carries out what has no record. Returns the names of what it would need and is missing."""
    missing: dict[str, None] = {}

    def find(name: str) -> pathlib.Path | None:
        for source in options.sources:
            if (source / name).exists():
                return source / name
        missing[name] = None
        return None

    for run in RUNS:
        if run.task not in (options.only or TASKS) or recorded.read(run.record, run.config()):
            continue
        folders = [find(name) for name in TASKS[run.task].folders]
        weights = find(run.weights) if run.weights else None
        if None not in folders and (weights is None) == (not run.weights):
            print(run.name, flush=True)
            carry_out(run, list(filter(None, folders)), weights, options.workdirs / run.name)
    return list(missing)


if __name__ == "__main__":
    main()
