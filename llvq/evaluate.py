"""Evaluation of a checkpoint: metrics of its reconstructions, and which codes it uses."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jaxtyping import Int32

from llvq import checkpointing
from llvq.codec import rates
from llvq.config import DatasetConfig, TrainConfig
from llvq.data import Dataset
from llvq.data.files import writing
from llvq.data.order import steps_per_epoch
from llvq.errors import UserError
from llvq.evaluation import pictures
from llvq.evaluation.evaluator import Evaluator
from llvq.models import factory
from llvq.runtime import sharding
from llvq.training.objective import Objective
from llvq.usage import CodebookUsage

_REPORT = "evaluation.json"


def evaluate(
    workdir: epath.PathLike,
    data: Dataset,
    *,
    checkpoint: epath.PathLike | None = None,
    batch_size: int | None = None,
    dataset: DatasetConfig | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint; writes evaluation.json and reconstructions.png into the workdir.

    Reconstruction metrics and coded rates are over the test split (over validation where there is
    none), codebook figures over train and validation, each image once and unflipped. The code model
    behind the rates is estimated over the training split and kept beside the checkpoint.

    Args:
      workdir: where results go, and the run whose newest checkpoint is taken by default.
      data: the data set; needs the splits "train" and "validation".
      checkpoint: another checkpoint to evaluate (see `checkpointing.find`).
      batch_size: images at a time, over all devices and hosts; by default the run's.
      dataset: names `data`, if it is not the run's; an imported checkpoint does not know its own.

    Returns:
      The contents of evaluation.json.

    Raises:
      UserError: if there is no such checkpoint, it is of another data set, or the workdir cannot be
        written to.
    """
    found, dataset = checkpointing.load_for(workdir, data, checkpoint, dataset)
    config, model = found.config, checkpointing.model_of(found)
    batch_size = batch_size or config.batch_size
    latent_height, _ = factory.latent_shape(model, data.image_shape)
    mesh = sharding.mesh_for_batches(batch_size, latent_height)
    state = jax.device_put(found.state, sharding.replicated(mesh))
    fitted = factory.abstract_model(config.architecture)
    factory.fit_to_mesh(fitted, mesh, data.image_shape)
    objective = Objective(config.loss, config.loss_options)
    evaluator = Evaluator(nnx.graphdef(fitted), objective, mesh)

    split = "test" if data.num_images.get("test") else "validation"
    logging.info("Evaluating %s on %d %s images", found.path, data.num_images[split], split)
    means = evaluator.measure(state, data, split, batch_size, CodebookUsage())
    assert means is not None  # nothing stops it
    picture, _ = evaluator.preview(state, data, split)

    usage = CodebookUsage()
    train, validation = (
        _counted(rates.codes(model, data, name), usage) for name in ("train", "validation")
    )
    code_model = rates.find_or_estimate(model, found.path, dataset, data, train)
    for _ in itertools.chain(train, validation):
        pass
    usage = usage.over_all_hosts()
    results = {
        "dataset": dataset.name,
        "quantizer": config.quantizer.name,
        "checkpoint": _name(found.path, workdir),
        "step": int(found.state.step),
        "split": split,
        **means,
        **_codebook_figures(usage, model.quantizer.num_codes),
        **rates.measure(model, code_model, data, split),
        **_length_of_run(config, data),
    }
    # A metric that is not finite is null, which JSON has a word for.
    results = {name: value if _is_finite(value) else None for name, value in results.items()}
    if jax.process_index() == 0:
        with writing(epath.Path(workdir) / "reconstructions.png") as file:
            pictures.write_png(file, picture)
        with writing(epath.Path(workdir) / _REPORT) as file:
            file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def _counted(
    blocks: Iterable[Int32[np.ndarray, "n h w ..."]], usage: CodebookUsage
) -> Iterator[Int32[np.ndarray, "n h w ..."]]:
    """The same blocks of codes, which go to `usage` on their way."""
    for block in blocks:
        usage.add_codes(block)
        yield block


def _codebook_figures(usage: CodebookUsage, num_codes: int | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "effective_codebook_size": usage.num_distinct,
        "effective_codebook_size_is_exact": usage.is_exact,
        "effective_codebook_size_relative_error": usage.standard_error,
        "num_quantized_vectors": usage.num_vectors,
        "perplexity": usage.perplexity,
        "plug_in_entropy_bits_per_vector": usage.entropy,
        "plug_in_entropy_error_bits": usage.entropy_standard_error,
    }
    if num_codes is None:
        return figures | {"basis_directions_in_use": usage.num_entries_in_use}
    return figures | {"codebook_utilization": usage.num_distinct / num_codes}


def _length_of_run(config: TrainConfig, data: Dataset) -> dict[str, int]:
    """The number of steps that a run's config asks for."""
    per_epoch = steps_per_epoch(data.num_images["train"], config.batch_size)
    return {"num_train_steps": config.num_train_steps or config.num_epochs * per_epoch}


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _name(checkpoint: epath.Path, workdir: epath.PathLike) -> str:
    """The path of a checkpoint, relative to its workdir if it is in it: a workdir may be moved."""
    root = checkpointing.absolute(workdir)
    return os.fspath(checkpoint.relative_to(root) if root in checkpoint.parents else checkpoint)


def read_evaluation(workdir: epath.PathLike, checkpoint: epath.Path) -> dict[str, Any]:
    """The evaluation of a checkpoint that a workdir's evaluation.json holds.

    Raises:
      UserError: if there is none, or it is of another checkpoint.
    """
    report = epath.Path(workdir) / _REPORT
    try:
        evaluation = json.loads(report.read_text())
    except (OSError, ValueError):
        evaluation = {}
    if evaluation.get("checkpoint") != _name(checkpoint, workdir):
        raise UserError(
            f"{report} does not hold an evaluation of {checkpoint}: run main.py --mode=evaluate "
            f"with --workdir={workdir} first"
        )
    # Older versions knew one reconstruction loss.
    return {"mse": evaluation["reconstruction_loss"], **evaluation}
