"""Writes a data set's images, once and checked, as ArrayRecord shards in a directory of TFDS's.

The directory is complete when dataset_info.json is in it, which is written last. Until then every
finished shard stands in checksums.json, so that whoever comes next, after a kill or an error,
goes on behind the last of them.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from etils import epath
from tqdm import tqdm

from input_pipeline.errors import DataError
from input_pipeline.records import RecordSource

VERSION = "1.0.0"  # of the directories; a new one whenever what is written changes

_CHECKSUMS = "checksums.json"
_BLOCK_BYTES = 1 << 20

# (split, positions within it) -> (name of the image in messages, its bytes) of each, in order.
ReadImages = Callable[[str, range], Iterable[tuple[str, bytes]]]


@dataclasses.dataclass(frozen=True)
class _Shard:
    file_name: str
    split: str
    positions: range  # of its images within the split


def is_prepared(directory: epath.Path) -> bool:
    """Whether a directory is complete: one half prepared is not."""
    return all((directory / name).exists() for name in ("dataset_info.json", "features.json"))


def open_prepared(
    directory: epath.Path,
    num_images: Mapping[str, int],
    order: Mapping[str, np.ndarray] | None = None,
) -> dict[str, RecordSource]:
    """The splits of a complete directory; see RecordSource.

    Raises:
      DataError: if they are not whole.
    """
    try:
        builder = tfds.builder_from_directory(directory)
        unknown = set(num_images) - set(builder.info.splits)
    except Exception as error:  # TFDS and its JSON and protobuf parsers raise whatever they like
        raise DataError(
            f"{directory / 'dataset_info.json'} cannot be read: delete it to have it written again"
        ) from error
    if unknown:
        raise DataError(f"{directory} has no split {unknown.pop()!r}: move it away")
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
    """Completes a directory; the shards that are finished already stay as they are.

    Holds a few images in memory at a time. On a file system with locks (not gs://) several
    processes may call it at once: one prepares, the others wait for it.

    Args:
      directory: where to write, made if need be.
      name: of the data set.
      num_images: in each split.
      read: gives the encoded images, asked for one shard's worth at a time.
      decode: an encoded image to its pixels, whole and strictly; each is checked with it. Raises
        ValueError, saying why, for an encoding that the data set must not have.
      image_shape: that every image must have, (height, width, channels).
      images_per_shard: in every shard but a split's last.
      num_bytes: of all images together, as read.
      seconds_per_image: that one core needs to read, check and write one.
      scratch_bytes: that `read` needs on the same disk besides.
      pixel_md5: what the pixels of each split's images must have, in hexadecimal, if it is known.
      about: the data set's description, homepage and license, for TFDS.

    Raises:
      DataError: if an image is damaged or another than it should be, if `read` raises it, or if
        the directory cannot be written.
    """
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _exclusive(directory):
            if is_prepared(directory):
                return
            shards = list(_plan(name, num_images, images_per_shard))
            checksums = _read_checksums(directory)
            paths = [directory / shard.file_name for shard in shards]
            on_disk = sum(path.stat().length for path in paths if path.name in checksums)
            num_missing = sum(
                len(shard.positions) for shard in shards if shard.file_name not in checksums
            )
            _announce(
                directory,
                num_missing,
                max(num_bytes - on_disk, 0) + scratch_bytes,
                num_missing * seconds_per_image / (os.cpu_count() or 1),
            )
            # Finished shards are in the progress bar too: reading them for their checksums takes
            # time.
            with tqdm(total=sum(num_images.values()), desc=name, unit=" images") as progress:
                for shard, path in zip(shards, paths, strict=True):
                    if path.name in checksums and sha256(path) == checksums[path.name]:
                        progress.update(len(shard.positions))
                        continue
                    images = read(shard.split, shard.positions)
                    md5s = None
                    if pixel_md5:
                        md5s = [pixel_md5[shard.split][i] for i in shard.positions]
                    checked = _checked(images, decode, image_shape, md5s)
                    checksums[path.name] = _write_shard(path, checked, progress)
                    _write_checksums(directory, checksums)
            _write_metadata(directory, name, shards, image_shape, about)


def sha256(path: epath.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_local(path: epath.Path) -> bool:
    """Whether a path is of this machine's file systems, not gs:// or the like."""
    return "://" not in os.fspath(path)


def _exclusive(directory: epath.Path) -> contextlib.AbstractContextManager:
    """Waits for whoever else prepares the directory; the lock of a killed process is released."""
    if not is_local(directory):
        return contextlib.nullcontext()
    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.info("Waiting for another process to prepare %s", directory)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _plan(name: str, num_images: Mapping[str, int], images_per_shard: int) -> Iterator[_Shard]:
    for split, count in num_images.items():
        starts = range(0, count, images_per_shard)
        for i, start in enumerate(starts):
            file_name = f"{name}-{split}.array_record-{i:05d}-of-{len(starts):05d}"
            yield _Shard(file_name, split, range(start, min(start + images_per_shard, count)))


def _announce(directory: epath.Path, num_images: int, num_bytes: int, seconds: float) -> None:
    """Says what is to come, unless the disk is too small for it."""
    free = ""
    if is_local(directory):
        free_bytes = shutil.disk_usage(directory).free
        if free_bytes < num_bytes:
            raise DataError(
                f"{directory} needs {num_bytes / 1e9:.1f} GB of disk, of which "
                f"{free_bytes / 1e9:.1f} GB are free: make room, or name another directory "
                "with --config.dataset.data_dir"
            )
        free = f" ({free_bytes / 1e9:.1f} GB free)"
    logging.info(
        "Preparing %s: %s images, %.1f GB of disk%s, about %.0f min besides any download; "
        "may be interrupted, the same command goes on",
        directory,
        f"{num_images:,}",
        num_bytes / 1e9,
        free,
        max(seconds / 60, 1),
    )


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    """Makes one line of what the file system or ArrayRecord raise."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{directory} cannot be written ({reason}): see to its disk and permissions, or name "
            "another directory with --config.dataset.data_dir"
        ) from error


def _read_checksums(directory: epath.Path) -> dict[str, str]:
    """The SHA-256 of every finished shard that is there."""
    try:
        entries = json.loads((directory / _CHECKSUMS).read_text())
        return {
            name: entry["sha256"] for name, entry in entries.items() if (directory / name).exists()
        }
    # None yet, or torn by a power cut.
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _write_checksums(directory: epath.Path, checksums: Mapping[str, str]) -> None:
    entries = {name: {"sha256": digest} for name, digest in checksums.items()}
    unfinished = directory / f"{_CHECKSUMS}.unfinished"
    unfinished.write_text(json.dumps(entries, indent=1))
    unfinished.replace(directory / _CHECKSUMS)


def _checked(
    images: Iterable[tuple[str, bytes]],
    decode: Callable[[bytes], tf.Tensor],
    image_shape: tuple[int, int, int],
    md5s: Sequence[str] | None,
) -> Iterator[tuple[str, bytes]]:
    """Passes on the images that are as they must be, decoded on all cores to see that."""
    cores = os.cpu_count() or 1

    def check(name: str, encoded: bytes, md5: str | None) -> tuple[str, bytes]:
        try:
            pixels = decode(encoded)
        except tf.errors.OpError as error:
            raise DataError(f"{name} is damaged, it cannot be decoded: fetch it again") from error
        except ValueError as error:
            raise DataError(f"{name} {error}: fetch the original") from error
        shape = tuple(pixels.shape)
        if shape != image_shape:
            raise DataError(f"{name} has the shape {shape}, not {image_shape}: fetch the original")
        if md5 and hashlib.md5(pixels.numpy()).hexdigest() != md5:
            raise DataError(f"{name} has other pixels than the published ones: fetch the original")
        return name, encoded

    with futures.ThreadPoolExecutor(cores) as pool:
        pending: collections.deque[futures.Future] = collections.deque()
        for (name, encoded), md5 in zip(images, md5s or itertools.repeat(None), strict=False):
            pending.append(pool.submit(check, name, encoded, md5))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_shard(path: epath.Path, images: Iterable[tuple[str, bytes]], progress: tqdm) -> str:
    """Writes a shard under another name and renames it; returns its SHA-256."""
    unfinished = path.parent / f"{path.name}.unfinished"
    writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
    for name, encoded in images:
        writer.write(_serialise(name, encoded))
        progress.update()
    writer.close()
    digest = sha256(unfinished)
    unfinished.replace(path)
    return digest


def _serialise(name: str, encoded: bytes) -> bytes:
    def feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {"image": feature(encoded), "name": feature(name.encode())}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def _write_metadata(
    directory: epath.Path,
    name: str,
    shards: Iterable[_Shard],
    image_shape: tuple[int, int, int],
    about: Mapping[str, str],
) -> None:
    template = tfds.core.ShardedFileTemplate(
        directory, dataset_name=name, filetype_suffix="array_record"
    )
    by_split: dict[str, list[_Shard]] = {}
    for shard in shards:
        by_split.setdefault(shard.split, []).append(shard)
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features={"image": tfds.features.Image(shape=image_shape), "name": tfds.features.Text()},
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.positions) for shard in of_split],
                num_bytes=sum((directory / shard.file_name).stat().length for shard in of_split),
                filename_template=template.replace(split=split),
            )
            for split, of_split in by_split.items()
        ],
        version=VERSION,
        check_data=False,  # would read through tf.data, which TFDS cannot from ArrayRecord
        **about,
    )
