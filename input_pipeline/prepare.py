"""Checks a data set's images and writes them, once, as ArrayRecord shards that TFDS can read.

The directory is complete once it has dataset_info.json, which is written last. Until then
checksums.json lists every finished shard, so that the next process, after a kill or an error,
continues after the last of them.
"""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tqdm import tqdm

from input_pipeline import shards
from input_pipeline.host_tensorflow import tf
from input_pipeline.records import RecordSource
from llvq.data.files import replacing
from llvq.errors import UserError

_CHECKSUMS = "checksums.json"

_T = TypeVar("_T")
_S = TypeVar("_S")

# (split, positions within it) -> each image's (name in messages, encoded bytes), in order.
ReadImages = Callable[[str, range], Iterable[tuple[str, bytes]]]


def is_prepared(directory: epath.Path) -> bool:
    """Whether a directory is completely prepared."""
    return all((directory / name).exists() for name in ("dataset_info.json", "features.json"))


def open_prepared(
    directory: epath.Path,
    num_images: Mapping[str, int],
    order: Mapping[str, np.ndarray] | None = None,
) -> dict[str, RecordSource]:
    """Opens the splits of a complete directory.

    Args:
      directory: where the data set was prepared.
      num_images: the number of images that each split must have.
      order: the stored position of each image of each split; the stored order if None.

    Raises:
      UserError: if a split is missing, incomplete or damaged.
    """
    logging.info("Reading %s", directory)
    try:
        builder = tfds.builder_from_directory(directory)
        unknown = set(num_images) - set(builder.info.splits)
    except Exception as error:  # TFDS and its parsers raise errors of many types
        raise UserError(
            f"{directory / 'dataset_info.json'} cannot be read: delete it to have it written again"
        ) from error
    if unknown:
        raise UserError(f"{directory} has no split {unknown.pop()!r}: move it away")
    return {
        split: RecordSource(builder, split, count, order[split] if order else None)
        for split, count in num_images.items()
    }


def prepare(
    directory: epath.Path,
    name: str,
    num_images: Mapping[str, int],
    read: ReadImages,
    decode: Callable[[bytes], tf.Tensor],
    *,
    image_shape: tuple[int, int, int],
    images_per_shard: int,
    num_bytes: int,
    seconds_per_image: float,
    scratch_bytes: int = 0,
    pixel_md5: Mapping[str, Sequence[str]] | None = None,
    about: Mapping[str, str],
) -> None:
    """Completes a directory; finished shards stay as they are.

    Holds a few images in memory at a time. On a file system with locks (not gs://) several
    processes may call it at once: one prepares, the others wait for it.

    Args:
      directory: where to write; created if need be.
      name: the data set's name.
      num_images: the number of images in each split.
      read: reads the encoded images of one shard at a time.
      decode: decodes an image completely, to check it. Raises ValueError, saying why, for an
        encoding that the data set must not have.
      image_shape: the shape that every image must have, (height, width, channels).
      images_per_shard: the number of images in every shard but a split's last.
      num_bytes: the total size of all images, as read.
      seconds_per_image: the time in which one core reads, checks and writes an image.
      scratch_bytes: the space on the same disk that `read` needs in addition.
      pixel_md5: the MD5 of each image's pixels in hexadecimal, by split, if it is known.
      about: the data set's description, homepage and license, for TFDS.

    Raises:
      UserError: if an image is damaged or not the expected one, if `read` raises it, or if the
        directory cannot be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _exclusive(directory):
            if is_prepared(directory):
                return
            planned = list(shards.plan(name, num_images, images_per_shard))
            checksums = _read_checksums(directory)
            paths = [directory / shard.file_name for shard in planned]
            on_disk = sum(path.stat().length for path in paths if path.name in checksums)
            num_missing = sum(
                len(shard.positions) for shard in planned if shard.file_name not in checksums
            )
            _announce(
                directory,
                num_missing,
                max(num_bytes - on_disk, 0) + scratch_bytes,
                num_missing * seconds_per_image / (os.cpu_count() or 1),
            )
            # The progress bar counts finished shards too, because checking them takes time.
            with tqdm(total=sum(num_images.values()), desc=name, unit=" images") as progress:
                for shard, path in zip(planned, paths, strict=True):
                    if path.name in checksums and shards.sha256(path) == checksums[path.name]:
                        progress.update(len(shard.positions))
                        continue
                    images = read(shard.split, shard.positions)
                    md5s = None
                    if pixel_md5:
                        md5s = [pixel_md5[shard.split][i] for i in shard.positions]
                    checked = _checked(images, decode, image_shape, md5s)
                    checksums[path.name] = shards.write(path, _serialised(checked, progress))
                    _write_checksums(directory, checksums)
            features = {
                "image": tfds.features.Image(shape=image_shape),
                "name": tfds.features.Text(),
            }
            shards.describe(directory, name, planned, features, about)


def is_local(path: epath.Path) -> bool:
    """Whether a path is on this machine's file systems, not on gs:// or the like."""
    return "://" not in os.fspath(path)


def _exclusive(directory: epath.Path) -> contextlib.AbstractContextManager:
    """Waits for any other process that prepares the directory; a killed one releases its lock."""
    if not is_local(directory):
        return contextlib.nullcontext()
    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.info("Waiting for another process to prepare %s", directory)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _announce(directory: epath.Path, num_images: int, num_bytes: int, seconds: float) -> None:
    """Logs the disk space and time to expect; raises UserError if the disk is too small."""
    free = ""
    if is_local(directory):
        free_bytes = shutil.disk_usage(directory).free
        if free_bytes < num_bytes:
            raise UserError(
                f"{directory} needs {num_bytes / 1e9:.1f} GB of disk and "
                f"{free_bytes / 1e9:.1f} GB are free: make room, or name another directory "
                "with --config.dataset.data_dir"
            )
        free = f" ({free_bytes / 1e9:.1f} GB free)"
    logging.info(
        "Preparing %s: %s images, %.1f GB of disk%s, about %.0f min plus any download; you may "
        "interrupt it and continue with the same command",
        directory,
        f"{num_images:,}",
        num_bytes / 1e9,
        free,
        max(seconds / 60, 1),
    )


@contextlib.contextmanager
def writing(directory: epath.Path) -> Iterator[None]:
    """Raises UserError in place of what the file system or ArrayRecord raises."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{directory} cannot be written ({error}): check its disk and permissions, or name "
            "another directory with --config.dataset.data_dir"
        ) from error


def _read_checksums(directory: epath.Path) -> dict[str, str]:
    """The SHA-256 of every finished shard that exists."""
    try:
        entries = json.loads((directory / _CHECKSUMS).read_text())
        return {
            name: entry["sha256"] for name, entry in entries.items() if (directory / name).exists()
        }
    # There is none yet, or a power cut damaged it.
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _write_checksums(directory: epath.Path, checksums: Mapping[str, str]) -> None:
    entries = {name: {"sha256": digest} for name, digest in checksums.items()}
    with replacing(directory / _CHECKSUMS) as path:
        path.write_text(json.dumps(entries, indent=1))


def _checked(
    images: Iterable[tuple[str, bytes]],
    decode: Callable[[bytes], tf.Tensor],
    image_shape: tuple[int, int, int],
    md5s: Sequence[str] | None,
) -> Iterator[tuple[str, bytes]]:
    """Yields the images after checking each; raises UserError for a wrong one."""

    def check(image: tuple[tuple[str, bytes], str | None]) -> tuple[str, bytes]:
        (name, encoded), md5 = image
        try:
            pixels = decode(encoded)
        except tf.errors.OpError as error:
            raise UserError(f"{name} is damaged and cannot be decoded: fetch it again") from error
        except ValueError as error:
            raise UserError(f"{name} {error}: fetch the original") from error
        shape = tuple(pixels.shape)
        if shape != image_shape:
            raise UserError(f"{name} has the shape {shape}, not {image_shape}: fetch the original")
        if md5 and hashlib.md5(pixels.numpy()).hexdigest() != md5:
            raise UserError(f"{name} has other pixels than published: fetch the original")
        return name, encoded

    return in_parallel(check, zip(images, md5s or itertools.repeat(None), strict=False))


def in_parallel(function: Callable[[_T], _S], values: Iterable[_T]) -> Iterator[_S]:
    """What a function makes of each value, in their order; on all cores, a few values ahead."""
    cores = os.cpu_count() or 1
    with futures.ThreadPoolExecutor(cores) as pool:
        pending: collections.deque[futures.Future[_S]] = collections.deque()
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _serialised(images: Iterable[tuple[str, bytes]], progress: tqdm) -> Iterator[bytes]:
    for image in images:
        yield _serialise(*image)
        progress.update()


def _serialise(name: str, encoded: bytes) -> bytes:
    def feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {"image": feature(encoded), "name": feature(os.fsencode(name))}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
