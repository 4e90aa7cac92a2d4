"""How fast the input pipelines are, next to a plain loop and to PyTorch's DataLoader.

    python benchmarks/input_pipeline.py [--cores=1] [--seconds=5] [--rounds=3]

Makes small data sets in the official layouts, with images that are as large as the real ones and
compress about as well, and reads them in the random order of training: decode, crop, flip, stack
into batches. Every reader runs in a process of its own that may use `--cores` cores, in turns. All
rates are medians. Memory is that process's, without the DataLoader's workers. The files are in
the page cache; reading them from a disk comes on top. Only the DataLoader's rows need PyTorch.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import io
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

from llvq.data import ArrayDataset, order
from llvq.runtime.console import markdown_table

STEPS_PER_SECOND = (1, 5, 20)  # for which a table says how many cores feed them
_NUM_PHOTOS = 8  # how many differ; the files repeat them


@dataclasses.dataclass(frozen=True)
class Kind:
    """A data set to read: it has few images, but of the real size.

    Attributes:
      name: of the data set, and of the files' encoding if there is a choice.
      module: in input_pipeline.
      batch_size: the config's.
      num_images: in the training split.
      stored_shape: of an image in its file, (height, width, channels).
      crop: (top, left, height, width) of the part that is used.
      encoding: for Pillow; empty for arrays in memory.
    """

    name: str
    module: str
    batch_size: int
    num_images: int
    stored_shape: tuple[int, int, int]
    crop: tuple[int, int, int, int]
    encoding: dict[str, Any]


_FFHQ = Kind(
    "FFHQ-1024 (PNG)",
    "ffhq1024",
    batch_size=32,
    num_images=96,
    stored_shape=(1024, 1024, 3),
    crop=(0, 0, 1024, 1024),
    encoding={"format": "PNG"},
)
# The official files take 7.1 KB (CelebA's JPEG) and 1.27 MB (FFHQ's PNG) on average.
KINDS = (
    Kind(
        "FashionMNIST",
        "fashion_mnist",
        batch_size=64,
        num_images=55_000,
        stored_shape=(28, 28, 1),
        crop=(0, 0, 28, 28),
        encoding={},
    ),
    Kind(
        "CelebA",
        "celeba",
        batch_size=64,
        num_images=2_048,
        stored_shape=(218, 178, 3),
        crop=(35, 15, 148, 148),
        encoding={"format": "JPEG", "quality": 80},
    ),
    _FFHQ,
    dataclasses.replace(
        _FFHQ, name="FFHQ-1024 (WebP)", encoding={"format": "WEBP", "lossless": True}
    ),
)


def _photo(seed: int, height: int, width: int) -> Image.Image:
    """Noise with the falling spectrum of a photograph, and some of a camera's noise."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    spectrum = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    brightness, *colours = np.fft.irfft2(spectrum / frequency**1.7, (height, width))
    pixels = np.stack([brightness + 0.3 * colour for colour in colours], axis=-1)
    pixels = 128 + 50 * pixels / pixels.std() + rng.normal(0, 1.2, (height, width, 1))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _path(kind: Kind, directory: pathlib.Path, index: int) -> pathlib.Path:
    """Returns the file of an image, as in the official release."""
    if kind.module == "celeba":
        return directory / f"img_align_celeba/{index + 1:06d}.jpg"
    return directory / f"images1024x1024/{index - index % 1000:05d}/{index:05d}.png"


def write_files(kind: Kind, directory: pathlib.Path) -> float:
    """Writes the training images and one for each other split; returns their mean size in bytes."""
    photos = []
    for seed in range(_NUM_PHOTOS):
        buffer = io.BytesIO()
        _photo(seed, *kind.stored_shape[:2]).save(buffer, **kind.encoding)
        photos.append(buffer.getvalue())
    for index in range(kind.num_images + 2):
        path = _path(kind, directory, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[index % _NUM_PHOTOS])
    splits = [0] * kind.num_images + [1, 2]
    partition = [f"{i:06d}.jpg {split}\n" for i, split in enumerate(splits, start=1)]
    (directory / "list_eval_partition.txt").write_text("".join(partition))
    return statistics.mean(map(len, photos))


def _pixels(kind: Kind) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (kind.num_images, *kind.stored_shape)).astype(np.uint8)


def open_pipeline(kind: Kind, directory: pathlib.Path) -> Any:
    """Opens the data set as main.py does; the first call prepares it."""
    from input_pipeline import celeba, ffhq1024

    manual_dir = os.fspath(directory)
    data_dir = os.fspath(directory / "prepared")
    num_images = {"train": kind.num_images, "validation": 1}
    if kind.module == "celeba":
        return celeba.load(data_dir, manual_dir, num_images=num_images | {"test": 1})
    if kind.module == "ffhq1024":
        return ffhq1024.load(data_dir, manual_dir, num_images=num_images)
    pixels = _pixels(kind)
    return ArrayDataset(train=pixels, validation=pixels[:1])


def _prepare(kind: Kind, directory: pathlib.Path) -> float:
    """Prepares the files; returns the seconds per image, summed over all cores."""
    import input_pipeline  # noqa: F401 (the import takes time that is not an image's)

    start = time.process_time()
    open_pipeline(kind, directory)
    return (time.process_time() - start) / kind.num_images


def _read_one(kind: Kind, directory: pathlib.Path, index: int, flip: bool) -> np.ndarray:
    """Reads one image with Pillow and NumPy."""
    top, left, height, width = kind.crop
    with Image.open(_path(kind, directory, index)) as image:
        pixels = np.asarray(image)[top : top + height, left : left + width]
    return pixels[:, ::-1] if flip else pixels


def _llvq(kind: Kind, directory: pathlib.Path, cores: int) -> Iterator[np.ndarray]:
    del cores  # TensorFlow uses all that the process may use
    batches = order.training_batches(kind.num_images, kind.batch_size, seed=0)
    for _, images in open_pipeline(kind, directory).batches("train", batches):
        yield images


def _loop(kind: Kind, directory: pathlib.Path, cores: int) -> Iterator[np.ndarray]:
    del cores  # it uses one
    pixels = None if kind.encoding else _pixels(kind)
    for batch in order.training_batches(kind.num_images, kind.batch_size, seed=0):
        if pixels is not None:
            yield np.stack([pixels[index] for index in batch.index])
        else:
            yield np.stack(
                [
                    _read_one(kind, directory, index, flip)
                    for index, flip in zip(batch.index, batch.flip, strict=True)
                ]
            )


class _TorchDataset:
    """The same images for a DataLoader, which reads them one by one."""

    def __init__(self, kind: Kind, directory: pathlib.Path) -> None:
        self._kind, self._directory = kind, directory
        self._pixels = None if kind.encoding else _pixels(kind)

    def __len__(self) -> int:
        return self._kind.num_images

    def __getitem__(self, index: int) -> object:
        import torch

        if self._pixels is not None:
            return torch.from_numpy(self._pixels[index])
        flip = bool(torch.rand(()) < 0.5)
        pixels = _read_one(self._kind, self._directory, index, flip)
        return torch.from_numpy(pixels.copy())


def _dataloader(
    kind: Kind, directory: pathlib.Path, cores: int, *, workers: bool
) -> Iterator[np.ndarray]:
    import torch

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        _TorchDataset(kind, directory),
        batch_size=kind.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores if workers else 0,
        persistent_workers=workers,
    )
    while True:
        for batch in loader:
            yield batch.numpy()


READERS: dict[str, Callable[[Kind, pathlib.Path, int], Iterator[np.ndarray]]] = {
    "llvq": _llvq,
    "Pillow + NumPy loop": _loop,
    "DataLoader": functools.partial(_dataloader, workers=False),
    "DataLoader, worker processes": functools.partial(_dataloader, workers=True),
}


def _measure(
    reader: str, kind: Kind, directory: pathlib.Path, cores: int, seconds: float
) -> tuple[float, float]:
    """(images/s, peak memory of the process in bytes) of a reader, after its first batches."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    batches = READERS[reader](kind, directory, cores)
    shape = (kind.batch_size, *kind.crop[2:], kind.stored_shape[2])
    for _ in range(4):  # which may have been read ahead before the clock starts
        assert next(batches).shape == shape
    start, num_batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or num_batches < 4:
        next(batches)
        num_batches += 1
    rate = num_batches * kind.batch_size / (time.perf_counter() - start)
    status = pathlib.Path("/proc/self/status").read_text()
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return rate, int(peak.split()[1]) * 1024


def _measure_in_own_process(*arguments: Any) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, *arguments).result()


def main() -> None:
    """Prints two tables in Markdown: rates, and the cores that feed a training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cores", type=int, default=1, help="for each reader")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each reader")
    options = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    if not 1 <= options.cores <= available:
        parser.error(f"--cores={options.cores}: there are 1 … {available}")
    readers = list(READERS)
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: no DataLoader", file=sys.stderr)
        readers = [reader for reader in readers if "DataLoader" not in reader]

    reading: list[list[str]] = []
    feeding: list[list[str]] = []
    for kind in KINDS:
        print(kind.name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            directory = pathlib.Path(temporary)
            size = write_files(kind, directory) if kind.encoding else math.prod(kind.stored_shape)
            preparing = _prepare(kind, directory)
            measured: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
            for _ in range(options.rounds):
                for reader in readers:
                    measured[reader].append(
                        _measure_in_own_process(
                            reader, kind, directory, options.cores, options.seconds
                        )
                    )
        rates: dict[str, float] = {}
        for reader, runs in measured.items():
            rates[reader], memory = (
                statistics.median(values) for values in zip(*runs, strict=True)
            )
            line = [kind.name, f"{size:,.0f}", reader, f"{rates[reader]:,.1f}"]
            line += [f"{1e3 * options.cores / rates[reader]:.3g}", f"{memory / 1e9:.2f} GB"]
            reading.append(line)
        per_core = rates["llvq"] / options.cores
        cores = [math.ceil(kind.batch_size * steps / per_core) for steps in STEPS_PER_SECOND]
        line = [kind.name, str(kind.batch_size), *map(str, cores), f"{1e3 * preparing:.2g}"]
        feeding.append(line)

    print(f"{platform.processor() or platform.machine()}, {options.cores} of {available} cores\n")
    header = ["data set", "bytes per image", "reader", "images/s"]
    print(markdown_table([*header, "ms × cores per image", "peak memory"], reading))
    print("\nCores that feed a training with llvq's pipeline, and what preparing takes, once:\n")
    header = ["data set", "batch", *(f"{steps} steps/s" for steps in STEPS_PER_SECOND)]
    print(markdown_table([*header, "preparing, ms × cores per image"], feeding))


if __name__ == "__main__":
    main()
