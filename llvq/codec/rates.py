"""The rate of a model's codes: the size of files that decode."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from llvq.codec import code_model as code_models
from llvq.codec import container
from llvq.codec.code_model import CodeModel
from llvq.codec.coder import Coder
from llvq.codec.density import with_density
from llvq.codec.estimate import estimate
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.data import Dataset
from llvq.errors import UserError
from llvq.models import VQVAE
from llvq.runtime import console
from llvq.runtime.distributed import all_gather


def _blocks(model: VQVAE, data: Dataset, split: str) -> list[range]:
    shape = num_codes(model, *data.image_shape[:2])
    return container.blocks(range(data.num_images[split]), *shape)


def find_or_estimate(model: VQVAE, checkpoint: epath.PathLike, data: Dataset) -> CodeModel:
    """The code model beside a checkpoint, or a new one, estimated over the training split.

    A new one is saved beside the checkpoint. All processes must call it at the same time.

    Args:
      model: of the checkpoint.
      checkpoint: its directory.
      data: the data set.

    Raises:
      UserError: if the one beside the checkpoint is damaged.
    """
    parameters = code_models.parameters_digest(model)
    (found, *_) = all_gather(code_models.load(checkpoint, parameters))
    if found:
        return found
    first, *others = _blocks(model, data, "train")
    own = [first, *others[jax.process_index() :: jax.process_count()]]
    num_rounds = 1 + -(-len(others) // jax.process_count())

    def blocks() -> Iterator[np.ndarray | None]:
        codes = Passes(model).of_split(data, "train", own)
        with console.Progress(num_rounds, "estimating the code model") as report:
            for i in range(num_rounds):
                yield next(codes, None)
                report(i + 1)

    estimated = estimate(blocks(), model.quantizer.code_width, parameters)
    if jax.process_index() == 0:
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
      was learnt with the quantizer, `density_coded_bits_per_vector` is of a stream in which codes
      cost what that says; see `with_density`.
    """
    blocks = _blocks(model, data, split)
    own = blocks[jax.process_index() :: jax.process_count()]
    lengths = np.concatenate(all_gather(_lengths(model, code_model, data, split, own)))
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
    model: VQVAE, code_model: CodeModel, data: Dataset, split: str, blocks: Sequence[range]
) -> np.ndarray:
    """(escaped codes, bytes, bytes with contexts, bytes by the density) of each block.

    The last column is only there if a density was learnt.
    """
    vocabulary, coder = Vocabulary(code_model, model.quantizer), Coder(code_model)
    ways = [
        functools.partial(coder.encode, with_contexts=False),
        functools.partial(coder.encode, with_contexts=True),
    ]
    if by_density := with_density(code_model, model.quantizer):
        ways.append(functools.partial(Coder(by_density).encode, with_contexts=False))
    lengths = np.zeros((len(blocks), 1 + len(ways)), np.int64)
    if not blocks:
        return lengths
    with console.Progress(len(blocks), f"coding {split}") as report:
        for i, codes in enumerate(Passes(model).of_split(data, split, blocks)):
            block = vocabulary.block(codes)
            lengths[i] = len(block.escaped), *(len(encode(block)) for encode in ways)
            report(i + 1)
    return lengths
