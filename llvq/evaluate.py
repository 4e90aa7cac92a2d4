"""Evaluation of a checkpoint: metrics of its reconstructions, and which codes it uses."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jaxtyping import Int32

from llvq import checkpointing
from llvq.codec import rates
from llvq.config import (
    ConfigLike,
    check_data,
    check_same_model,
    global_batch_size,
    of_saved,
    parse,
)
from llvq.data import Dataset
from llvq.data.files import writing
from llvq.data.order import steps_per_epoch
from llvq.errors import UserError
from llvq.evaluation import pictures
from llvq.evaluation.evaluator import Evaluator
from llvq.runtime import sharding
from llvq.training import train_state
from llvq.usage import CodebookUsage

_REPORT = "evaluation.json"


def evaluate(
    config: ConfigLike,
    workdir: epath.PathLike,
    data: Dataset,
    *,
    checkpoint: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint; writes evaluation.json and reconstructions.png into the workdir.

    Reconstruction metrics and coded rates are over the test split (over validation where there is
    none), codebook figures over train and validation, each image once and unflipped. The code model
    behind the rates is estimated over the training split and kept beside the checkpoint.

    Args:
      config: the run's config; `model`, `quantizer` and `dataset.name` must be the checkpoint's.
      workdir: where results go, and the run whose newest checkpoint is taken by default.
      data: the data set; needs the splits "train" and "validation".
      checkpoint: another checkpoint to evaluate (see `checkpointing.find`).

    Returns:
      The contents of evaluation.json.

    Raises:
      UserError: if the config is impossible, there is no such checkpoint, it is of another model,
        or the workdir cannot be written to.
    """
    config = parse(config)
    check_data(config, data)
    batch_size = global_batch_size(config, jax.device_count())
    mesh = sharding.mesh_for_batches(batch_size, config.latent_shape[0])
    source = workdir if checkpoint is None else checkpoint
    checkpointing.find(source)  # before a workdir is made
    checkpointing.require_writable(workdir)
    found = checkpointing.load(source)
    check_same_model(config, found.config, os.fspath(found.path))
    state = jax.device_put(found.state, sharding.replicated(mesh))
    model = train_state.abstract_model(config.architecture)
    train_state.fit_to_mesh(model, mesh, config.latent_shape)
    evaluator = Evaluator(nnx.graphdef(model), mesh)

    split = "test" if data.num_images.get("test") else "validation"
    logging.info("Evaluating %s on %d %s images", found.path, data.num_images[split], split)
    means = evaluator.measure(state, data, split, batch_size, CodebookUsage())
    assert means is not None  # nothing stops it
    picture, _ = evaluator.preview(state, data, split)

    trained = checkpointing.model_of(found, compute_dtype=config.compute_dtype)
    trained.value_range = config.model.value_range  # an imported one may not know it
    usage = CodebookUsage()
    train, validation = (
        _counted(rates.codes(trained, data, name), usage) for name in ("train", "validation")
    )
    code_model = rates.find_or_estimate(trained, found.path, config.dataset, data, train)
    for _ in itertools.chain(train, validation):
        pass
    usage = usage.over_all_hosts()
    results = {
        "dataset": config.dataset.name,
        "quantizer": config.quantizer.name,
        "checkpoint": _name(found.path, workdir),
        "step": int(found.state.step),
        "split": split,
        **means,
        **_codebook_figures(usage, model.quantizer.num_codes),
        **rates.measure(trained, code_model, data, split),
        **_length_of_run(found.config, data),
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


def _length_of_run(saved: Mapping[str, Any], data: Dataset) -> dict[str, int]:
    """The number of steps that a run's config asks for; nothing for an imported checkpoint."""
    run = of_saved(saved)
    if "num_epochs" not in run:
        return {}
    per_epoch = steps_per_epoch(data.num_images["train"], run["batch_size"])
    return {"num_train_steps": run["num_train_steps"] or run["num_epochs"] * per_epoch}


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
    return evaluation
