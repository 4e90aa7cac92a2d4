"""CelebA (Liu et al. 2015): 202,599 aligned faces of 218×178, of which the centre is used.

The images of a split are read in the order of their file names, whatever their origin. On disk
they are in TFDS's order (by a hash of the file name), in its own directories and in ours alike.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core import hashing

from input_pipeline import image_files, prepare, shards, tfds_builders
from input_pipeline.host_tensorflow import tf
from input_pipeline.pipeline import Pipeline
from input_pipeline.records import RecordSource
from llvq.errors import UserError

IMAGE_SHAPE = (148, 148, 3)
STORED_SHAPE = (218, 178, 3)
NUM_IMAGES = {"train": 162_770, "validation": 19_867, "test": 19_962}  # in the order of file names

_TOP, _LEFT = 35, 15
_IMAGES = "img_align_celeba"
_PARTITION = "list_eval_partition.txt"
_IMAGES_PER_SHARD = 5_000
_SECONDS_PER_IMAGE = 0.002
_PROBE_URL = "https://drive.google.com"
_ABOUT = {
    "description": "CelebFaces Attributes: 202,599 photographs of faces, aligned, 218×178.",
    "homepage": "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "license": "For research that is not commercial",
}
_PREPARE_AGAIN = "prepare celeb_a again with TFDS"
_FETCH = (
    f"fetch {_IMAGES}.zip and {_PARTITION} from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html "
    "by hand, put both into one directory and name it with --config.dataset.manual_dir"
)


def load(
    data_dir: str = "", manual_dir: str = "", *, num_images: Mapping[str, int] = NUM_IMAGES
) -> Pipeline:
    """Opens CelebA: as prepared before, TFDS's `celeb_a`, official files, or TFDS's download.

    Images that are not in ArrayRecord yet are converted once, into DATA_DIR/celeba.

    Args:
      data_dir: directory of TFDS; its default if empty.
      manual_dir: directory of img_align_celeba.zip (or the folder img_align_celeba) and
        list_eval_partition.txt. If empty: DATA_DIR/downloads/manual/celeba.
      num_images: the number of images in each split.

    Raises:
      UserError: if the data cannot be found or downloaded, or is not CelebA.
    """
    sources = _open(image_files.data_directory(data_dir), manual_dir, num_images)
    return Pipeline(sources, IMAGE_SHAPE, _decode)


def _decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes the centre of an image, as accurately as Pillow; TensorFlow's default is not."""
    crop = (_TOP, _LEFT, *IMAGE_SHAPE[:2])
    return tf.io.decode_and_crop_jpeg(encoded, crop, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_whole(encoded: bytes) -> tf.Tensor:
    """Decodes all of an image, with the channels it has, and refuses anything but JPEG."""
    height, width, _ = tf.io.extract_jpeg_shape(encoded)
    return tf.io.decode_and_crop_jpeg(encoded, (0, 0, height, width))


def _open(
    root: epath.Path, manual_dir: str, num_images: Mapping[str, int]
) -> dict[str, RecordSource]:
    stored = _stored_names(num_images)
    order = {split: np.argsort(names) for split, names in stored.items()}
    directory = root / "celeba" / shards.VERSION
    if prepare.is_prepared(directory):
        return prepare.open_prepared(directory, num_images, order)

    builder = tfds_builders.find("celeb_a", root)
    files = None
    if not builder.is_prepared():
        manual = image_files.manual_directory("celeba", root, manual_dir)
        files = image_files.find(manual, _IMAGES, required=bool(manual_dir))
        if files:
            _check_partition(manual / _PARTITION, num_images)
        else:
            builder = tfds_builders.download(
                "celeb_a", root, _PROBE_URL, f"Google Drive limits downloads, so {_FETCH}"
            )
    if files:
        read = functools.partial(files.read, stored)
        num_bytes = files.num_bytes(itertools.chain(*stored.values()))
    elif builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return {
            split: RecordSource(builder, split, count, order[split], _PREPARE_AGAIN)
            for split, count in num_images.items()
        }
    else:
        logging.info("Converting %s from TFRecord to ArrayRecord, once", builder.data_path)
        read = functools.partial(_read_tfds, builder, stored)
        num_bytes = builder.info.dataset_size
    prepare.prepare(
        directory,
        "celeba",
        num_images,
        read,
        _decode_whole,
        image_shape=STORED_SHAPE,
        images_per_shard=_IMAGES_PER_SHARD,
        num_bytes=num_bytes,
        seconds_per_image=_SECONDS_PER_IMAGE,
        about=_ABOUT,
    )
    return prepare.open_prepared(directory, num_images, order)


def _file_names(num_images: Mapping[str, int]) -> dict[str, list[str]]:
    """The official file names of each split, numbered consecutively across the splits."""
    numbers = itertools.count(1)
    return {
        split: [f"{number:06d}.jpg" for number in itertools.islice(numbers, count)]
        for split, count in num_images.items()
    }


def _stored_names(num_images: Mapping[str, int]) -> dict[str, list[str]]:
    """The file names of each split, in the order in which TFDS stores the images."""
    return {
        split: sorted(names, key=hashing.Hasher(split).hash_key)
        for split, names in _file_names(num_images).items()
    }


def _check_partition(path: epath.Path, num_images: Mapping[str, int]) -> None:
    """Raises UserError unless every line names the next file and the number of its split."""
    expected = [
        f"{name} {number}"
        for number, names in enumerate(_file_names(num_images).values())
        for name in names
    ]
    try:
        found = [" ".join(line.split()) for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_FETCH}") from error
    for i, (want, have) in enumerate(itertools.zip_longest(expected, found), start=1):
        if want != have:
            raise UserError(
                f"{path}, line {i}: expected {want or 'no more lines'}, found "
                f"{have or 'nothing'}; it is not the official list: {_FETCH}"
            )


def _read_tfds(
    builder: tfds.core.DatasetBuilder,
    stored: Mapping[str, list[str]],
    split: str,
    positions: range,
) -> Iterator[tuple[str, bytes]]:
    """Reads images of a TFRecord directory, in the order in which they are stored."""
    names = stored[split][positions.start : positions.stop]
    dataset = builder.as_dataset(
        split=f"{split}[{positions.start}:{positions.stop}]",
        shuffle_files=False,
        read_config=tfds.ReadConfig(interleave_cycle_length=1),  # otherwise TFDS mixes the shards
        decoders=tfds.decode.PartialDecoding(
            {"image": True}, decoders={"image": tfds.decode.SkipDecoding()}
        ),
    )
    num_read = 0
    try:
        for name, example in zip(names, dataset.as_numpy_iterator(), strict=False):
            yield f"{name} in {builder.data_path}", example["image"]
            num_read += 1
    except tf.errors.OpError as error:
        raise UserError(
            f"{builder.data_path}, {split} record {positions.start + num_read} or its file cannot "
            f"be read: {_PREPARE_AGAIN}"
        ) from error
    if num_read != len(names):
        raise UserError(
            f"{builder.data_path} lacks {split} records from {positions.start + num_read} on: "
            f"{_PREPARE_AGAIN}"
        )
