"""Measures the rate of a model's codes: the size of streams that decode."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, Int64

from llvq.codec import code_model as code_models
from llvq.codec import container
from llvq.codec.code_model import CodeModel
from llvq.codec.coder import Coder
from llvq.codec.density import with_density
from llvq.codec.estimate import estimate
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.config import DatasetConfig
from llvq.data import Dataset
from llvq.errors import UserError
from llvq.models import VQVAE
from llvq.runtime import console
from llvq.runtime.distributed import all_gather


def _blocks(model: VQVAE, data: Dataset, split: str) -> list[range]:
    shape = num_codes(model, *data.image_shape[:2])
    return container.blocks(range(data.num_images[split]), *shape)


def codes(model: VQVAE, data: Dataset, split: str) -> Iterator[Int32[np.ndarray, "n h w ..."]]:
    """Encodes a split's images, block by block; each process encodes a share of the blocks.

    Args:
      model: the model that makes the codes.
      data: the data set.
      split: the name of the split.
    """
    own = _blocks(model, data, split)[jax.process_index() :: jax.process_count()]
    with console.Progress(len(own), f"encoding {split}") as report:
        for i, block in enumerate(Passes(model).of_split(data, split, own), start=1):
            yield block
            report(i)


def find_or_estimate(
    model: VQVAE,
    checkpoint: epath.PathLike,
    dataset: DatasetConfig,
    data: Dataset,
    blocks: Iterable[Int32[np.ndarray, "n h w ..."]],
) -> CodeModel:
    """Loads the code model of a checkpoint, or estimates one over the training split.

    The code model beside the checkpoint is used if it was estimated over the same images. A new one
    is saved there, unless one of other images exists, which the checkpoint's streams may need. All
    processes must call this at the same time.

    Args:
      model: the model in the checkpoint.
      checkpoint: the checkpoint's directory.
      dataset: the config of the data set.
      data: the data set.
      blocks: `codes` of the training split; consumed only if a code model has to be estimated.

    Raises:
      UserError: if the code model beside the checkpoint is damaged.
    """
    parameters = code_models.parameters_digest(model)
    shape = "×".join(map(str, data.image_shape))
    images = f"{data.num_images['train']:,} training images of {shape}"
    source = " ".join(filter(None, (dataset.name, dataset.fit, images, data.fingerprint)))
    (found, *_) = all_gather(code_models.load(checkpoint))
    if found and found.parameters != parameters:
        found = None
    if found and found.source == source:
        return found
    estimated = estimate(blocks, model.quantizer.code_width, parameters)
    estimated = dataclasses.replace(estimated, source=source)
    if found:
        logging.warning(
            "%s keeps its code model of %s; this evaluation or encoding uses one of %s",
            os.fspath(checkpoint),
            found.source or "other images",
            source,
        )
    elif jax.process_index() == 0:
        try:
            estimated.save(checkpoint)
        except UserError as error:
            logging.warning("The code model is not saved: %s", error)
    return estimated


def measure(model: VQVAE, code_model: CodeModel, data: Dataset, split: str) -> dict[str, float]:
    """Measures the rate of a split as one stream. All processes must call this at the same time.

    Args:
      model: the model that makes the codes.
      code_model: the cost of each code.
      data: the data set.
      split: the name of the split.

    Returns:
      `coded_bits_per_vector`, from the bytes of the stream; the same `_with_tables`, which a
      receiver without the code model needs as well; `coded_bits_per_pixel`;
      `context_coded_bits_per_vector`, for a stream in which neighbours predict a code;
      `escaped_fraction`, the fraction of vectors whose code has no entry; and `vocabulary_size`,
      the number of entries. If the quantizer learned a density, `density_coded_bits_per_vector` is
      for a stream under that density; see `with_density`.
    """
    lengths = np.concatenate(all_gather(_lengths(model, code_model, codes(model, data, split))))
    height, width, _ = data.image_shape
    num_pixels = data.num_images[split] * height * width
    num_vectors = data.num_images[split] * int(np.prod(num_codes(model, height, width)))
    escaped, *sizes = lengths.T
    num_bytes, num_bytes_in_context, *by_density = map(container.num_bytes, sizes)
    found = {
        "coded_bits_per_vector": 8 * num_bytes / num_vectors,
        "coded_bits_per_vector_with_tables": 8
        * (num_bytes + code_model.num_table_bytes)
        / num_vectors,
        "coded_bits_per_pixel": 8 * num_bytes / num_pixels,
        "context_coded_bits_per_vector": 8 * num_bytes_in_context / num_vectors,
        "escaped_fraction": float(escaped.sum()) / num_vectors,
        "vocabulary_size": len(code_model.vocabulary),
    }
    if by_density:
        found["density_coded_bits_per_vector"] = 8 * by_density[0] / num_vectors
    return found


def _lengths(
    model: VQVAE, code_model: CodeModel, blocks: Iterable[Int32[np.ndarray, "n h w ..."]]
) -> Int64[np.ndarray, "blocks figures"]:
    """Returns (escaped codes, bytes, bytes with contexts, bytes by the density) of each block.

    Without a learned density there is no last column.
    """
    vocabulary, coder = Vocabulary(code_model, model.quantizer), Coder(code_model)
    ways = [
        functools.partial(coder.encode, with_contexts=False),
        functools.partial(coder.encode, with_contexts=True),
    ]
    if by_density := with_density(code_model, model.quantizer):
        ways.append(functools.partial(Coder(by_density).encode, with_contexts=False))
    lengths = [
        (len(block.escaped), *(len(encode(block)) for encode in ways))
        for block in map(vocabulary.block, blocks)
    ]
    return np.array(lengths, np.int64).reshape(-1, 1 + len(ways))
