"""FashionMNIST as TFDS prepares it, which shuffles what it writes."""

from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import hashing

from input_pipeline import tfds_builders
from input_pipeline.host_tensorflow import tf
from llvq.data import Images
from llvq.errors import UserError, first_line


def read(root: epath.Path, num_images: Mapping[str, int]) -> dict[str, Images] | None:
    """The images that TFDS has prepared, in the official order; None if it has not.

    Args:
      root: directory of TFDS.
      num_images: in each split.

    Raises:
      UserError: if they cannot be read.
    """
    builder = tfds_builders.find("fashion_mnist", root)
    return _read(builder, num_images) if builder.is_prepared() else None


def download(
    root: epath.Path, num_images: Mapping[str, int], file: str, remedy: str
) -> dict[str, Images]:
    """Has TFDS download and prepare the images, and reads them.

    Args:
      root: directory of TFDS.
      num_images: in each split.
      file: one of those that TFDS downloads, to see whether its server answers.
      remedy: what to do if the download fails, for the message.

    Raises:
      UserError: if the download fails.
    """
    url = f"{tfds_builders.find('fashion_mnist', root).URL}{file}"
    return _read(tfds_builders.download("fashion_mnist", root, url, remedy), num_images)


def _read(builder: tfds.core.DatasetBuilder, num_images: Mapping[str, int]) -> dict[str, Images]:
    images = {}
    for split in num_images:
        try:
            shuffled = _read_split(builder, split)
        except Exception as error:
            raise UserError(
                f"{builder.data_path} cannot be read ({first_line(error)}): delete it to have it "
                "prepared anew"
            ) from error
        if len(shuffled) != num_images[split]:
            raise UserError(
                f"{builder.data_path} has {len(shuffled)} images in split {split!r}, not "
                f"{num_images[split]}: delete it to have it prepared anew"
            )
        hasher = hashing.Hasher(split)  # TFDS writes examples in the order of their hash
        order = sorted(range(len(shuffled)), key=hasher.hash_key)
        images[split] = np.empty_like(shuffled)
        images[split][order] = shuffled
    return images


def _read_split(builder: tfds.core.DatasetBuilder, split: str) -> Images:
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        dataset = builder.as_dataset(split=split, batch_size=-1, shuffle_files=False)
        return dataset["image"].numpy()
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    encoded = [example["image"] for example in source.__getitems__(range(len(source)))]
    dataset = tf.data.Dataset.from_tensor_slices(encoded)
    dataset = dataset.map(tf.io.decode_png, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(len(encoded)).get_single_element().numpy()
