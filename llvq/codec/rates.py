"""The rate of a model's codes: the size of files that decode."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from llvq.codec import code_model as code_models
from llvq.codec import container
from llvq.codec.code_model import CodeModel
from llvq.codec.coder import Coder
from llvq.codec.estimate import estimate
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.data import Dataset
from llvq.errors import UserError
from llvq.models import VQVAE
from llvq.runtime import console
from llvq.runtime.distributed import all_gather


def ranges(num_images: int, images_per_range: int) -> list[range]:
    """All images of a split, in ranges of so many but for the last."""
    starts = range(0, num_images, images_per_range)
    return [range(start, min(start + images_per_range, num_images)) for start in starts]


def _blocks(model: VQVAE, data: Dataset, split: str) -> list[range]:
    step = container.images_per_block(*num_codes(model, *data.image_shape[:2]))
    return ranges(data.num_images[split], step)


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
    count, own = jax.process_count(), [first, *others[jax.process_index() :: jax.process_count()]]

    def blocks() -> Iterator[np.ndarray | None]:
        yield from Passes(model).of_split(data, "train", own)
        for _ in range(len(own), 1 + -(-len(others) // count)):
            yield None

    with console.Progress(1 + len(others), "estimating the code model") as report:
        width = model.quantizer.code_width
        estimated = estimate(blocks(), width, parameters, lambda done: report(done))
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
      a stream in which a code's neighbours predict it; and `escaped_fraction`, of the vectors whose
      codes have no entry of their own.
    """
    blocks = _blocks(model, data, split)
    own = blocks[jax.process_index() :: jax.process_count()]
    lengths = np.concatenate(all_gather(_lengths(model, code_model, data, split, own)))
    height, width, _ = data.image_shape
    num_pixels = data.num_images[split] * height * width
    num_vectors = data.num_images[split] * int(np.prod(num_codes(model, height, width)))
    num_bytes, num_bytes_in_context = (container.num_bytes(column) for column in lengths.T[:2])
    return {
        "coded_bits_per_vector": 8 * num_bytes / num_vectors,
        "coded_bits_per_vector_with_tables": 8
        * (num_bytes + code_model.num_table_bytes)
        / num_vectors,
        "coded_bits_per_pixel": 8 * num_bytes / num_pixels,
        "context_coded_bits_per_vector": 8 * num_bytes_in_context / num_vectors,
        "escaped_fraction": float(lengths[:, 2].sum()) / num_vectors,
    }


def _lengths(
    model: VQVAE, code_model: CodeModel, data: Dataset, split: str, blocks: Sequence[range]
) -> np.ndarray:
    """(bytes, bytes with contexts, escaped codes) of each block, [blocks, 3]."""
    lengths = np.zeros((len(blocks), 3), np.int64)
    if not blocks:
        return lengths
    vocabulary, coder = Vocabulary(code_model, model.quantizer.code_width), Coder(code_model)
    with console.Progress(len(blocks), f"coding {split}") as report:
        for i, codes in enumerate(Passes(model).of_split(data, split, blocks)):
            block = vocabulary.block(codes)
            sizes = (len(coder.encode(block, with_contexts=option)) for option in (False, True))
            lengths[i] = *sizes, len(block.escaped)
            report(i + 1)
    return lengths
