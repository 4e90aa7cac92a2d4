"""FFHQ (Karras et al. 2019, arXiv 1812.04948): 70,000 faces of 1024×1024.

The first 60,000 are the training split, the last 10,000 the validation split, as published. Their
encoding, PNG or lossless WebP, is kept. If the release's ffhq-dataset-v2.json is at hand, their
pixels are compared with its MD5s.
"""

import functools
import itertools
import json
import pathlib
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import huggingface_hub
from absl import logging
from etils import epath

from input_pipeline import image_files, prepare, shards
from input_pipeline.host_tensorflow import tf
from input_pipeline.pipeline import Pipeline
from llvq.errors import UserError, first_line

IMAGE_SHAPE = (1024, 1024, 3)
NUM_IMAGES = {"train": 60_000, "validation": 10_000}  # in the order of their indices
IMAGES_PER_GROUP = 1_000  # in every folder of the official release and every tar on the hub

_FOLDER = "images1024x1024"
_METADATA = "ffhq-dataset-v2.json"
_HUB_DATASET = "gaunernst/ffhq-1024-wds"
_HUB_REVISION = "d74f1f1f59e3bbe975bee29872b9bef827314577"
_HUB_SECONDS = 8.0  # for a first answer
_SECONDS_PER_IMAGE = 0.04
_ABOUT = {
    "description": "Flickr-Faces-HQ: 70,000 photographs of faces, aligned and cropped, 1024×1024.",
    "homepage": "https://github.com/NVlabs/ffhq-dataset",
    "license": "CC BY-NC-SA 4.0",
}
_WAYS_OUT = (
    f"set HF_ENDPOINT to a mirror of the hub, or name the directory that holds the official "
    f"{_FOLDER} (folder or .zip) with --config.dataset.manual_dir"
)


def load(
    data_dir: str = "",
    manual_dir: str = "",
    *,
    num_images: Mapping[str, int] = NUM_IMAGES,
    images_per_group: int = IMAGES_PER_GROUP,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
) -> Pipeline:
    """Opens FFHQ-1024: as prepared before, the official release, or the Hugging Face hub's copy.

    Images that are not prepared yet are converted once, into DATA_DIR/ffhq1024.

    Args:
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of the official folder images1024x1024 or of images1024x1024.zip, and of
        the official ffhq-dataset-v2.json, which is optional. If empty:
        DATA_DIR/downloads/manual/ffhq1024, then the hub.
      num_images: the number of images in each split.
      images_per_group: the number of images in every folder of the release, tar and shard.
      image_shape: the shape of every image, (height, width, channels).

    Raises:
      UserError: if the data cannot be found or downloaded, or is not FFHQ-1024.
    """
    root = image_files.data_directory(data_dir)
    directory = root / "ffhq1024" / shards.VERSION
    if not prepare.is_prepared(directory):
        indices = _indices(num_images)
        scratch = _scratch(directory)
        manual = image_files.manual_directory("ffhq1024", root, manual_dir)
        files = image_files.find(manual, _FOLDER, required=bool(manual_dir))
        if files:
            names = {
                split: [_path(i, images_per_group) for i in part] for split, part in indices.items()
            }
            read: prepare.ReadImages = functools.partial(files.read, names)
            num_bytes, scratch_bytes = files.num_bytes(itertools.chain(*names.values())), 0
        else:
            hub = _Hub(scratch, indices, images_per_group)
            read, num_bytes, scratch_bytes = hub.read, hub.num_bytes, hub.largest_tar
        prepare.prepare(
            directory,
            "ffhq1024",
            num_images,
            read,
            _decode_lossless,
            image_shape=image_shape,
            images_per_shard=images_per_group,
            num_bytes=num_bytes,
            seconds_per_image=_SECONDS_PER_IMAGE,
            scratch_bytes=scratch_bytes,
            pixel_md5=_read_md5s(manual / _METADATA, indices),
            about=_ABOUT,
        )
        shutil.rmtree(scratch, ignore_errors=True)  # the hub's client leaves its notes there
    sources = prepare.open_prepared(directory, num_images)
    return Pipeline(sources, image_shape, _decode)


def _decode(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Decodes PNG or WebP, with the channels it has."""
    return tf.io.decode_image(encoded, expand_animations=False)


def _decode_lossless(encoded: bytes) -> tf.Tensor:
    """Does the same, but refuses encodings that may be lossy, such as JPEG and lossy WebP."""
    pixels = _decode(encoded)
    is_png_of_8_bits = encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[24] == 8
    is_webp = encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP"
    if not is_png_of_8_bits and not (is_webp and b"VP8L" in _webp_chunks(encoded)):
        raise ValueError("is neither a PNG of 8 bits a channel nor lossless WebP")
    return pixels


def _webp_chunks(encoded: bytes) -> Iterator[bytes]:
    """The types of a WebP's chunks: VP8L holds lossless pixels, VP8 lossy ones (RFC 9649)."""
    place = 12
    while place < len(encoded):
        yield encoded[place : place + 4]
        size = int.from_bytes(encoded[place + 4 : place + 8], "little")
        place += 8 + size + size % 2


def _scratch(directory: epath.Path) -> epath.Path:
    """The directory for downloaded tars, on a local disk, as the hub's client requires."""
    if prepare.is_local(directory):
        return directory / "download"
    return epath.Path(tempfile.gettempdir()) / "ffhq1024-download"


def _indices(num_images: Mapping[str, int]) -> dict[str, range]:
    """The official indices of the images in each split."""
    ends = itertools.accumulate(num_images.values())
    return {
        split: range(end - count, end)
        for (split, count), end in zip(num_images.items(), ends, strict=True)
    }


def _read_md5s(path: epath.Path, indices: Mapping[str, range]) -> dict[str, list[str]] | None:
    """The published MD5 of every image's pixels; None if there is no such file."""
    if not path.exists():
        logging.info("Pixels are not compared with the published MD5s: %s does not exist", path)
        return None

    def keep_md5(entry: dict[str, Any]) -> Any:
        """Drops the rest of an image's entry: the whole file would take gigabytes of memory."""
        return entry.get("image", entry.get("pixel_md5", entry))

    try:
        md5s = json.loads(path.read_text(), object_hook=keep_md5)
        return {split: [str(md5s[str(i)]) for i in part] for split, part in indices.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): fetch it again, or remove "
            "it to do without"
        ) from error


def _path(index: int, images_per_group: int) -> str:
    """The path of an image within the official release."""
    return f"{index - index % images_per_group:05d}/{index:05d}.png"


class _Hub:
    """The hub's copy of the data set: tars, fetched one at a time.

    Attributes:
      num_bytes: the total size of the tars.
      largest_tar: the size of the largest one, in bytes.
    """

    def __init__(self, scratch: epath.Path, indices: Mapping[str, range], per_tar: int) -> None:
        """Args:
        scratch: a local directory for the current tar.
        indices: the indices of the images in each split.
        per_tar: the number of images in a tar.

        Raises:
          UserError: if the hub cannot be reached, or lacks a tar.
        """
        self._scratch = scratch
        self._indices = indices
        self._per_tar = per_tar
        self._api = huggingface_hub.HfApi()
        info = self._ask(
            self._api.dataset_info,
            _HUB_DATASET,
            revision=_HUB_REVISION,
            timeout=_HUB_SECONDS,
            files_metadata=True,
        )
        files = {file.rfilename: file for file in info.siblings or ()}
        try:
            starts = range(0, sum(map(len, indices.values())), per_tar)
            self._tars = {start: files[f"{start:05d}.tar"] for start in starts}
        except KeyError as error:
            raise UserError(f"{self._where} lacks {error.args[0]}: {_WAYS_OUT}") from error
        for tar in self._tars.values():
            if tar.size is None or tar.lfs is None:
                raise UserError(
                    f"{self._where} lacks size or checksum of {tar.rfilename}: {_WAYS_OUT}"
                )
        sizes = [tar.size for tar in self._tars.values()]
        self.num_bytes, self.largest_tar = sum(sizes), max(sizes)

    @property
    def _where(self) -> str:
        return f"{self._api.endpoint}/datasets/{_HUB_DATASET} at revision {_HUB_REVISION}"

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:  # the client and its HTTP library raise errors of many types
            raise UserError(
                f"{self._where} cannot be read ({first_line(error)}): {_WAYS_OUT}"
            ) from error

    def read(self, split: str, positions: range) -> Iterator[tuple[str, bytes]]:
        """Reads the images of one tar, and deletes it at the end or after an error."""
        indices = self._indices[split][positions.start : positions.stop]
        path = self._fetch(self._tars[indices.start])
        try:
            with tarfile.open(path) as tar:
                members = _members(tar, path, indices)
                for index in indices:
                    file = tar.extractfile(members[index])
                    assert file is not None  # a regular file: see _members
                    yield f"{members[index].name} of {path.name}", file.read()
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path} cannot be read ({error}): {_WAYS_OUT}") from error
        finally:
            path.unlink()

    def _fetch(self, tar: Any) -> epath.Path:
        path = epath.Path(
            self._ask(
                self._api.hf_hub_download,
                _HUB_DATASET,
                tar.rfilename,
                repo_type="dataset",
                revision=_HUB_REVISION,
                local_dir=self._scratch,
                etag_timeout=_HUB_SECONDS,
            )
        )
        # Lossless WebP has no checksum of its own.
        if shards.sha256(path) != tar.lfs.sha256:
            path.unlink()
            raise UserError(
                f"{path} was damaged in transfer: run the same command to fetch it again"
            )
        return path


def _members(tar: tarfile.TarFile, path: epath.Path, indices: range) -> dict[int, tarfile.TarInfo]:
    """A tar's images by index; raises UserError unless it holds exactly these, each once."""
    members: dict[int, tarfile.TarInfo] = {}
    for member in tar:
        stem, _, suffix = pathlib.PurePosixPath(member.name).name.partition(".")
        if not member.isfile() or suffix != "webp":
            continue
        index = int(stem) if stem.isdecimal() else -1
        if index in members or index not in indices:
            what = "twice" if index in members else f"outside {indices[0]:05d} … {indices[-1]:05d}"
            raise UserError(f"{path.name} of {_HUB_DATASET} has {member.name} {what}: {_WAYS_OUT}")
        members[index] = member
    for index in indices:
        if index not in members:
            raise UserError(f"{path.name} of {_HUB_DATASET} lacks {index:05d}.webp: {_WAYS_OUT}")
    return members
