"""The rate of a model's codes: the size of files that decode."""

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
    """The codes of a split's images, block by block; of several processes, each has its share.

    Args:
      model: makes the codes.
      data: the data set.
      split: of it.
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
    """The code model of a checkpoint for a data set: the one beside it, or a new one.

    A new one is saved beside the checkpoint, unless there is one of other images, which the
    checkpoint's streams may need. All processes must call it at the same time.

    Args:
      model: of the checkpoint.
      checkpoint: its directory.
      dataset: names the data set.
      data: the data set.
      blocks: `codes` of its training split; not touched if there is a code model of them.

    Raises:
      UserError: if the one beside the checkpoint is damaged.
    """
    parameters = code_models.parameters_digest(model)
    shape = "×".join(map(str, data.image_shape))
    images = f"{data.num_images['train']:,} training images of {shape}"
    source = " ".join(filter(None, (dataset.name, dataset.fit, images, data.fingerprint)))
    (found, *_) = all_gather(code_models.load(checkpoint, parameters))
    if found and found.source == source:
        return found
    estimated = estimate(blocks, model.quantizer.code_width, parameters)
    estimated = dataclasses.replace(estimated, source=source)
    if found:
        logging.warning(
            "%s keeps its code model of %s; this evaluation or encoding uses one of %s",
            *(os.fspath(checkpoint), found.source or "other images", source),
        )
    elif jax.process_index() == 0:
        try:
            estimated.save(checkpoint)
        except UserError as error:
            logging.warning("The code model is not kept: %s", error)
    return estimated


def measure(model: VQVAE, code_model: CodeModel, data: Dataset, split: str) -> dict[str, float]:
    """The rate of a split whose codes make one stream. All processes must call it at once.

    Args:
      model: makes the codes.
      code_model: what they cost.
      data: the data set.
      split: of it.

    Returns:
      `coded_bits_per_vector`, from the bytes of the stream; the same `_with_tables`, which the
      receiver may have to be sent, too; `coded_bits_per_pixel`; `context_coded_bits_per_vector`, of
      a stream in which a code's neighbours predict it; `escaped_fraction`, of the vectors whose
      codes have no entry of their own; and `vocabulary_size`, the number of entries. If a density
      was learned with the quantizer, `density_coded_bits_per_vector` is of a stream in which codes
      cost what that says; see `with_density`.
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
    """(escaped codes, bytes, bytes with contexts, bytes by the density) of each block.

    The last column is only there if a density was learned.
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
