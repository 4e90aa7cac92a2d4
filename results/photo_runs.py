"""The runs of results.photos: their images, and how each is trained and measured."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

import input_pipeline
from configs import image_folder
from llvq import Codec
from llvq.config import TrainConfig, parse
from llvq.data.image_files import SUFFIXES, find_files, read_image
from llvq.evaluation.pictures import write_png
from llvq.import_torch import import_checkpoint
from results import other_codecs, recorded
from results.curves import CURVES, in_name
from results.recorded import Record

DIRECTORY = pathlib.Path(__file__).parent / "photos"


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
        return f"{self.task}/{self.curve}_{in_name(self.value)}_seed_{self.seed}"

    @property
    def record(self) -> pathlib.Path:
        """The file of the run's record."""
        return DIRECTORY / f"{self.name}.json"

    def config(self) -> TrainConfig:
        """Returns the run's config, without the place of its images."""
        task, curve = TASKS[self.task], CURVES[self.curve]
        config = curve.at(self.value, image_folder.get_config(f"{curve.quantizer},paper"))
        config.dataset.fit = task.fit
        config.model.image_shape = (task.size, task.size, 3)
        config.model.hidden_dims = task.hidden_dims
        config.batch_size, config.num_epochs = task.batch_size, task.num_epochs
        config.seed, config.schedule = self.seed, "cosine"
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

# Near 5 bits per vector.
_BEST = (("e8_lattice", 2.5e-4), ("residual_vq", 2))
_OTHERS = (("sparse_lattice", 512), ("vq_restarts", 32), ("fsq", (8, 5)))
# Near 12.
_FINE = (
    ("e8_lattice", 5e-5),
    ("residual_vq", 3),
    ("sparse_lattice", 2**16),
    ("vq_restarts", 4096),
    ("fsq", (8, 8, 8, 6, 5)),
)

RUNS = [
    *(Run("photographs", *model) for model in (*_BEST, *_OTHERS, *_FINE)),
    *(Run("photographs", curve, value, seed) for curve, value in _BEST for seed in (32, 432)),
    *(Run("photographs_celeba", *model) for model in _OTHERS[:2]),
    *(Run("faces", *model) for model in _OTHERS),
    Run("faces", "vq", 512, weights="ffhq1024/vq.ckpt"),
    Run("faces", "sparse_lattice", 512, weights="ffhq1024/sparse_lattice.ckpt"),
    Run("full_size", "sparse_lattice", 512),
    Run("shipped", "sparse_lattice", 512),
]


def _joined(folders: Sequence[pathlib.Path], directory: pathlib.Path) -> pathlib.Path:
    """Links the images of several folders into one, split by split."""
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
) -> Record:
    """Trains and measures a model, or resumes it. Returns its record.

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
        codec = Codec.load(checkpoint)
        record["photographs"] = other_codecs.measure(codec, photographs)
        if run == first_of(run.task):
            names = [path.name for path in paths]
            index = names.index(task.shown) if task.shown else 0
            picture, num_bytes = other_codecs.compared(codec, photographs[index])
            record["shown"] = {"name": names[index], "bytes": num_bytes}
            write_png(picture_of(run.task), picture)
    return record


def picture_of(task: str) -> pathlib.Path:
    """Returns the file of a task's picture."""
    return DIRECTORY / f"{task}.png"


def first_of(task: str) -> Run:
    """Returns the run whose reconstruction a task's picture shows."""
    return next(run for run in RUNS if run.task == task)
