"""ArrayRecord shards that TFDS can read: their names, their content and their description."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from input_pipeline import host_tensorflow as _  # noqa: F401  TFDS imports TensorFlow
from llvq.data.files import replacing

VERSION = "1.0.0"  # of the prepared data; raise it whenever the files' content changes

_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """Attributes:
    file_name: in the data set's directory.
    split: which it is a part of.
    positions: its examples' positions within the split.
    """

    file_name: str
    split: str
    positions: range


def plan(name: str, num_examples: Mapping[str, int], examples_per_shard: int) -> Iterator[Shard]:
    """The shards of a data set.

    Args:
      name: of the data set.
      num_examples: the number of examples in each split.
      examples_per_shard: the number of examples in every shard but a split's last.
    """
    for split, count in num_examples.items():
        starts = range(0, count, examples_per_shard)
        for i, start in enumerate(starts):
            file_name = f"{name}-{split}.array_record-{i:05d}-of-{len(starts):05d}"
            yield Shard(file_name, split, range(start, min(start + examples_per_shard, count)))


def write(path: epath.Path, examples: Iterable[bytes]) -> str:
    """Writes a shard, completely or not at all; returns its SHA-256."""
    with replacing(path) as unfinished:
        writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
        for example in examples:
            writer.write(example)
        writer.close()
        return sha256(unfinished)


def describe(
    directory: epath.Path,
    name: str,
    shards: Iterable[Shard],
    features: Mapping[str, Any],
    about: Mapping[str, str],
) -> None:
    """Writes dataset_info.json and features.json, by which TFDS knows a directory of shards.

    Args:
      directory: of the shards, which are complete.
      name: of the data set.
      shards: all of them.
      features: of an example, as TFDS takes them.
      about: description, homepage and license.
    """
    template = tfds.core.ShardedFileTemplate(
        directory, dataset_name=name, filetype_suffix="array_record"
    )
    by_split: dict[str, list[Shard]] = {}
    for shard in shards:
        by_split.setdefault(shard.split, []).append(shard)
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
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


def sha256(path: epath.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
