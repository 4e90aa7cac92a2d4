"""A data set's codes as tokens: integers that a second-stage model can be trained on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int

from llvq import checkpointing
from llvq.codec import rates
from llvq.codec.container import blocks, images_per_block
from llvq.codec.passes import Passes, num_codes
from llvq.codec.vocabulary import Vocabulary
from llvq.config import DatasetConfig
from llvq.data import Dataset
from llvq.runtime import console, distributed

_BLOCKS_PER_SHARD = 8


class Writer(Protocol):
    """Where tokens go; see `input_pipeline.tokens.TokenWriter`, which has the arguments."""

    @property
    def shards(self) -> Sequence[Any]:
        """The parts of the output, each with `split` and `positions`."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether everything is written."""
        ...

    def begin(
        self, job: Mapping[str, Any], vocabulary: Int[np.ndarray, "tokens code_width"]
    ) -> None:
        """Makes the directory, or finds it as an earlier process left it."""
        ...

    def is_finished(self, shard: Any) -> bool:
        """Whether a shard is written."""
        ...

    def write(
        self, shard: Any, tokens: Int[np.ndarray, "n height width"], num_outside: int
    ) -> None:
        """Writes a shard."""
        ...

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Completes the directory and returns the whole manifest."""
        ...


def encode(
    workdir: epath.PathLike,
    data: Dataset,
    make_writer: Callable[..., Writer],
    *,
    checkpoint: epath.PathLike | None = None,
    dataset: DatasetConfig | None = None,
) -> epath.Path:
    """Writes the tokens of all splits to WORKDIR/tokens, and vocabulary.npy beside them.

    A token is the id of a code in the vocabulary of the checkpoint's code model, by falling
    frequency. A code that the vocabulary lacks becomes the id of the nearest entry, as its vector
    goes. Images are in the order of the data set, unflipped; the tokens of an image are
    [height, width]. The files depend on the checkpoint and the data alone, not on batch size,
    devices or processes, each of which writes its own shards. After an interruption the same call
    writes what is missing.

    Args:
      workdir: where the directory goes, and the run whose newest checkpoint is taken by default.
      data: the data set.
      make_writer: makes the writer; see `input_pipeline.tokens.TokenWriter`.
      checkpoint: another checkpoint (see `checkpointing.find`).
      dataset: names `data`, if it is not the run's.

    Returns:
      The directory.

    Raises:
      UserError: if there is no such checkpoint, it is of another data set, or the directory holds
        other tokens or cannot be written.
    """
    found, dataset = checkpointing.load_for(workdir, data, checkpoint, dataset)
    model = checkpointing.model_of(found)
    train = rates.codes(model, data, "train")
    code_model = rates.find_or_estimate(model, found.path, dataset, data, train)
    vocabulary = Vocabulary(code_model, model.quantizer)

    shape = num_codes(model, *data.image_shape[:2])
    directory = epath.Path(workdir) / "tokens"
    images_per_shard = _BLOCKS_PER_SHARD * images_per_block(*shape)
    writer = make_writer(
        directory, dataset.name, data.num_images, images_per_shard, shape, vocabulary.size
    )
    job = {
        "dataset": dataset.name,
        "num_images": dict(data.num_images),
        "fit": dataset.fit,
        "images": data.fingerprint,
        "quantizer": found.config.quantizer.name,
        "step": int(found.state.step),
        "parameters": code_model.parameters,
        "code_model": code_model.digest,
        "image_shape": list(data.image_shape),
        "value_range": list(model.value_range),
        "preprocessing": "uint8 pixels mapped linearly to value_range; nothing is flipped",
        "token_shape": list(shape),
        "order": "images in the data set's order; tokens row by row, from the upper left corner",
        "vocabulary": "vocabulary.npy: the code of each token, by falling frequency",
        "vocabulary_size": vocabulary.size,
    }
    if jax.process_index() == 0:
        writer.begin(job, vocabulary.codes)
    distributed.barrier("the directory is made")
    if writer.is_complete:
        logging.info("%s is complete", directory)
        return directory
    _write_missing(writer, Passes(model), vocabulary, data, shape)
    distributed.barrier("all shards are written")
    if jax.process_index() == 0:
        _summarise(writer.finish(job), directory)
    return directory


def _write_missing(
    writer: Writer,
    passes: Passes,
    vocabulary: Vocabulary,
    data: Dataset,
    token_shape: tuple[int, int],
) -> None:
    """Writes this process's share of the shards, but for those that are finished."""
    own = writer.shards[jax.process_index() :: jax.process_count()]
    missing = [
        (shard, blocks(shard.positions, *token_shape))
        for shard in own
        if not writer.is_finished(shard)
    ]
    done = 0
    with console.Progress(sum(len(parts) for _, parts in missing), "encoding") as report:
        for split in data.num_images:
            of_split = [(shard, parts) for shard, parts in missing if shard.split == split]
            codes = passes.of_split(data, split, [part for _, parts in of_split for part in parts])
            for shard, parts in of_split:
                tokens, num_outside = [], 0
                for _ in parts:
                    ids, outside = vocabulary.tokens(next(codes))
                    tokens.append(ids)
                    num_outside += outside
                    report(done := done + 1)
                writer.write(shard, np.concatenate(tokens), num_outside)


def _summarise(manifest: Mapping[str, Any], directory: epath.Path) -> None:
    shards = manifest["shards"].values()
    num_tokens = sum(shard["num_images"] for shard in shards) * np.prod(manifest["token_shape"])
    num_outside = sum(shard["num_outside_vocabulary"] for shard in shards)
    logging.info(
        "%s has %s tokens of %s kinds (%s); %.3g%% stand for a code outside the vocabulary",
        directory,
        f"{num_tokens:,}",
        f"{manifest['vocabulary_size']:,}",
        manifest["dtype"],
        100 * num_outside / num_tokens,
    )
