"""Anybody's own images: all PNG, JPEG and WebP files of a folder, brought to one size.

They are prepared once, as lossless PNG in ArrayRecord. Sub-folders train, validation and test are
the splits where there is a folder train; else a hash of each file's path decides, so that a file
that is added moves no other.
"""

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from input_pipeline import image_files, prepare, shards
from input_pipeline.host_tensorflow import tf
from input_pipeline.pipeline import Pipeline
from llvq.data.files import writing
from llvq.data.image_files import SUFFIXES, find_files, read_image
from llvq.errors import UserError

SPLITS = ("train", "validation", "test")

_HELD_OUT = 0.05  # the share of validation and of test, where a hash decides
_IMAGES_PER_SHARD = 5_000
_SECONDS_PER_IMAGE = 0.02
_SOURCES = "sources.json"
_ABOUT = {"description": "Images of a folder.", "homepage": "", "license": "Its owner's"}


class Way(NamedTuple):
    """How files become images of one size; see `load`."""

    image_shape: tuple[int, int, int]
    fit: str
    convert: bool


class Source(NamedTuple):
    """A file of the folder.

    Attributes:
      name: its path within the folder.
      fingerprint: its size in bytes, and when it was changed last.
      num_images: how many it makes; 0 if it is too small for a tile, or cannot be used.
      is_usable: False if it is damaged, or of a kind that is refused.
    """

    name: str
    fingerprint: tuple[int, int]
    num_images: int = 0
    is_usable: bool = True


def load(
    data_dir: str,
    manual_dir: str,
    image_shape: tuple[int, int, int],
    *,
    fit: str = "",
    flip: bool = False,
    convert: bool = False,
    skip_damaged: bool = False,
) -> Pipeline:
    """Opens a folder of images, and prepares it first if that has not been done.

    Args:
      data_dir: directory of TFDS, where the prepared images go; its default if empty.
      manual_dir: the folder.
      image_shape: (height, width, channels) of every image; 1 or 3 channels.
      fit: how an image comes to that size. "resize", or empty: scaled until it just covers it, and
        cropped to the centre. "tiles": cut into as many as fit in, from the upper left corner.
      flip: whether training mirrors each image with probability ½.
      convert: whether to convert what has transparency, or more than 8 bits; see `read_image`.
      skip_damaged: whether to leave out files that cannot be used, instead of ending with a list.

    Raises:
      UserError: if there is no folder, if it has changed since it was prepared, or if there are
        files that cannot be used.
    """
    if image_shape[-1] not in (1, 3):
        raise UserError(f"config.model.image_shape={image_shape}: must have 1 or 3 channels")
    if not manual_dir:
        raise UserError("image_folder: name the folder with --config.dataset.manual_dir")
    folder = epath.Path(manual_dir).expanduser().resolve()
    way = Way(image_shape, fit or "resize", convert)
    name = _name(folder, way)
    directory = image_files.data_directory(data_dir) / name / shards.VERSION
    recorded = _read_sources(directory)
    if folder.is_dir():
        sources = _list(folder)
        if recorded is None:
            sources = _examine(folder, sources, way)
        else:
            _require_unchanged(folder, directory, recorded, sources)
            sources = recorded
    elif recorded is not None and prepare.is_prepared(directory):
        sources = recorded
    else:
        raise UserError(f"--config.dataset.manual_dir={manual_dir}: there is no such folder")
    if not skip_damaged:
        _require_usable(folder, sources)

    by_split = _split(sources)
    num_images = {split: sum(s.num_images for s in part) for split, part in by_split.items()}
    for split in ("train", "validation"):
        if not num_images.get(split):
            raise UserError(
                f"{folder} has too few images ({sum(num_images.values())} of {image_shape}): none "
                f"is left for {split}; add some, or make sub-folders train and validation"
            )
    if recorded is None:
        with prepare.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _write_sources(directory, sources)
    if not prepare.is_prepared(directory):
        height, width, channels = image_shape
        prepare.prepare(
            directory,
            name,
            num_images,
            _Reader(folder, directory, by_split, way).read,
            tf.io.decode_png,
            image_shape=image_shape,
            images_per_shard=_IMAGES_PER_SHARD,
            num_bytes=sum(num_images.values()) * height * width * channels,
            seconds_per_image=_SECONDS_PER_IMAGE,
            about=_ABOUT,
        )
    records = prepare.open_prepared(directory, num_images)
    return Pipeline(
        records, image_shape, tf.io.decode_png, flip=flip, fingerprint=_digest(by_split)
    )


def _name(folder: epath.Path, way: Way) -> str:
    """The name of the prepared data set: another one for another folder, or another way."""
    size = "x".join(map(str, way.image_shape))
    stem = re.sub(r"\W", "_", folder.name.lower(), flags=re.ASCII)
    digest = hashlib.sha256(json.dumps([os.fspath(folder), *way]).encode()).hexdigest()[:8]
    return f"image_folder_{stem}_{size}_{way.fit}_{digest}"


def _digest(by_split: Mapping[str, Sequence[Source]]) -> str:
    """A digest of the files' names, sizes and numbers of images; a copy has the same."""
    files = {
        split: [(source.name, source.fingerprint[0], source.num_images) for source in sources]
        for split, sources in by_split.items()
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _list(folder: epath.Path) -> list[Source]:
    """All image files of a folder, by their names, without hidden ones."""
    found = [
        Source("/".join(path.relative_to(folder).parts), _fingerprint(path))
        for path in find_files(folder, SUFFIXES)
    ]
    if not found:
        raise UserError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    found.sort()
    if not any(source.name.startswith("train/") for source in found):
        return found
    in_splits = [source for source in found if source.name.split("/")[0] in SPLITS]
    if len(in_splits) < len(found):
        logging.warning(
            "%s: %d images beside the sub-folders %s are left out",
            folder,
            len(found) - len(in_splits),
            ", ".join(SPLITS),
        )
    return in_splits


def _fingerprint(path: epath.Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere; reading it says so
        return 0, 0
    return stat.length, int(stat.mtime)


def _examine(
    folder: epath.Path,
    found: Sequence[Source],
    way: Way,
) -> list[Source]:
    """The same files with what each makes, after decoding every one of them."""
    height, width, channels = way.image_shape

    def count(source: Source) -> Source | UserError:
        try:
            pixels = read_image(folder / source.name, channels, convert=way.convert)
        except UserError as error:
            return error
        tiles = (pixels.shape[0] // height) * (pixels.shape[1] // width)
        return source._replace(num_images=tiles if way.fit == "tiles" else 1)

    examined: list[Source] = []
    problems: list[UserError] = []
    small: list[str] = []
    with tqdm(total=len(found), desc=f"checking {folder.name}", unit=" files") as progress:
        for source, outcome in zip(found, prepare.in_parallel(count, found), strict=True):
            if isinstance(outcome, UserError):
                problems.append(outcome)
                outcome = source._replace(is_usable=False)
            elif not outcome.num_images:
                small.append(source.name)
            examined.append(outcome)
            progress.update()
    for problem in problems:
        logging.warning("%s", problem)
    if small:
        logging.warning(
            "%d of %d files of %s are smaller than a tile and left out, the first being %s",
            *(len(small), len(found), folder, small[0]),
        )
    return examined


def _require_usable(folder: epath.Path, sources: Sequence[Source]) -> None:
    if unusable := [source.name for source in sources if not source.is_usable]:
        raise UserError(
            f"{len(unusable)} of {len(sources)} files of {folder} cannot be used, the first being "
            f"{unusable[0]}: repair or remove them; --config.dataset.skip_damaged=True leaves them "
            "out, --config.dataset.convert=True converts transparency and 16 bits"
        )


def _read_sources(directory: epath.Path) -> list[Source] | None:
    """What `_write_sources` has kept; None if nothing."""
    try:
        kept = json.loads((directory / _SOURCES).read_text())
        return [Source(name, (size, time), *rest) for name, size, time, *rest in kept]
    except (OSError, ValueError, TypeError):
        return None


def _write_sources(directory: epath.Path, sources: Sequence[Source]) -> None:
    files = [(name, *fingerprint, *rest) for name, fingerprint, *rest in sources]
    with writing(directory / _SOURCES) as path:
        path.write_text(json.dumps(files))


def _require_unchanged(
    folder: epath.Path,
    directory: epath.Path,
    recorded: Sequence[Source],
    found: Sequence[Source],
) -> None:
    before, now = ({s.name: s.fingerprint for s in sources} for sources in (recorded, found))
    if before != now:
        added, removed = len(now.keys() - before.keys()), len(before.keys() - now.keys())
        changed = sum(before[name] != now[name] for name in before.keys() & now.keys())
        raise UserError(
            f"{folder} has changed since it was prepared ({added} files added, {removed} removed, "
            f"{changed} changed): delete {directory} to have it prepared again"
        )


def _share(name: str) -> float:
    """A number from 0 to 1 that depends on a file's name alone."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """The files of each split; all images of a file are in one."""
    tops = {source.name.split("/")[0] for source in sources if "/" in source.name}

    def split_of(source: Source) -> str:
        top = source.name.split("/")[0]
        if "train" not in tops:
            held_out = _share(source.name) / _HELD_OUT
            return "validation" if held_out < 1 else "test" if held_out < 2 else "train"
        if top == "train" and "validation" not in tops and _share(source.name) < _HELD_OUT:
            return "validation"
        return top

    by_split: dict[str, list[Source]] = {split: [] for split in SPLITS}
    for source in sources:
        by_split[split_of(source)].append(source)
    return {split: part for split, part in by_split.items() if any(s.num_images for s in part)}


class _Reader:
    """Reads the images that files make, by their positions within the splits."""

    def __init__(
        self,
        folder: epath.Path,
        directory: epath.Path,
        by_split: Mapping[str, Sequence[Source]],
        way: Way,
    ) -> None:
        self._folder = folder
        self._directory = directory
        self._by_split = by_split
        self._ends = {
            split: list(itertools.accumulate(source.num_images for source in part))
            for split, part in by_split.items()
        }
        self._way = way

    def read(self, split: str, positions: range) -> Iterator[tuple[str, bytes]]:
        """Yields some images of a split, with their names; see `prepare.ReadImages`."""
        ends, sources = self._ends[split], self._by_split[split]
        first = bisect.bisect_right(ends, positions.start)
        last = bisect.bisect_left(ends, positions.stop)
        chosen = [source for source in sources[first : last + 1] if source.num_images]
        parts = prepare.in_parallel(self._images, chosen)
        images = itertools.chain.from_iterable(parts)
        begin = positions.start - (ends[first - 1] if first else 0)
        yield from itertools.islice(images, begin, begin + len(positions))

    def _images(self, source: Source) -> list[tuple[str, bytes]]:
        height, width, channels = self._way.image_shape
        path = self._folder / source.name
        pixels = read_image(path, channels, convert=self._way.convert)
        if _fingerprint(path) != source.fingerprint:
            raise UserError(
                f"{path} has changed while the folder was prepared: delete {self._directory} to "
                "have it prepared again"
            )
        return [
            (f"{source.name}{place}", tf.io.encode_png(image).numpy())
            for place, image in cut(pixels, height, width, self._way.fit)
        ]


def cut(
    pixels: UInt8[np.ndarray, "h w channels"], height: int, width: int, fit: str
) -> Iterator[tuple[str, UInt8[np.ndarray, "height width channels"]]]:
    """The images of one size that an image makes, with their places in it.

    Args:
      pixels: of the image.
      height: of what it makes.
      width: likewise.
      fit: see `load`.
    """
    if fit == "resize":
        single = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        fitted = ImageOps.fit(Image.fromarray(single), (width, height), Image.Resampling.LANCZOS)
        yield "", np.asarray(fitted).reshape(height, width, -1)
        return
    for top in range(0, pixels.shape[0] - height + 1, height):
        for left in range(0, pixels.shape[1] - width + 1, width):
            yield f" at {top}, {left}", pixels[top : top + height, left : left + width]
