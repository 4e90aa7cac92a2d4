"""Evaluation: reconstruction metrics of a split, and the codebook's usage over splits."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from llvq import checkpointing, scaling
from llvq import config as configuration
from llvq.config import Config
from llvq.data import Dataset, order
from llvq.errors import UserError
from llvq.evaluation import metrics, pictures
from llvq.models.vqvae import VQVAE
from llvq.runtime import console, sharding
from llvq.training import train_state
from llvq.training.train_state import DTYPES, TrainState
from llvq.training.train_step import scale_images
from llvq.usage.counting import CodeCounts, count_codes
from llvq.usage.table import CodebookUsage

ProgressFactory = Callable[[int], Callable[[int], Any]]

NUM_PICTURES = 8

_COUNTED = ("train", "validation")  # the splits of the codebook figures
_REPORT = "evaluation.json"


def measure_images(
    model: VQVAE,
    images: UInt8[Array, "batch height width channels"],
    mask: Bool[Array, "batch"],
    value_range: tuple[float, float],
    param_dtype: DTypeLike,
    mesh: Mesh,
) -> tuple[dict[str, Float[Array, ""]], Int[Array, "batch h w ..."]]:
    """Sums of each metric over the images that the mask lets count, and the codes of all."""
    packed, packing = model.pack(images, mesh)
    outputs, codes, quantizer_losses = model(
        scale_images(packed, value_range, param_dtype), mask=mask, packing=packing
    )
    inputs = scale_images(images, value_range, param_dtype)
    outputs = model.unpack(outputs, packing).astype(param_dtype)
    a, b = (metrics.to_unit_range(x, value_range) for x in (inputs, outputs))
    by_image = {
        "reconstruction_loss": jnp.mean((outputs - inputs) ** 2, axis=(1, 2, 3)),
        "psnr": metrics.psnr(a, b),
        "ssim": metrics.ssim(a, b),
    }
    count = jnp.sum(mask)
    sums = {name: jnp.sum(x, where=mask) for name, x in by_image.items()}
    return sums | {name: loss * count for name, loss in quantizer_losses.items()}, codes


class Evaluator:
    """The jitted steps of evaluation, and what goes over whole splits with them.

    Attributes (each a jitted function of state and images, uint8):
      usage_step: the codes, counted; takes the mask of images and the levels, see `count_codes`.
      metrics_step: sums of each metric, see `measure_images`, and likewise the codes.
      preview_step: originals and reconstructions in [0, 1], histogram data; all replicated.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[VQVAE],
        value_range: tuple[float, float],
        param_dtype: DTypeLike,
        mesh: Mesh,
    ) -> None:
        """Args:
        graphdef: the model's structure (see `train_state.split`).
        value_range: what 0 … 255 is mapped to before the network.
        param_dtype: of losses and metrics.
        mesh: the devices.
        """
        self._mesh = mesh
        whole, by_device = sharding.replicated(mesh), sharding.device_sharded(mesh)

        def load(state: TrainState) -> VQVAE:
            return nnx.merge(graphdef, state.params, state.statistics)

        def scale(images: UInt8[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
            return scale_images(images, value_range, param_dtype)

        def count(model: VQVAE, codes: Array, mask: Array, levels: Array) -> CodeCounts:
            width = model.quantizer.code_width
            return count_codes(codes, mask, levels, code_width=width, mesh=mesh)

        def usage_step(
            state: TrainState,
            images: UInt8[Array, "batch height width channels"],
            mask: Bool[Array, "batch"],
            levels: Int32[Array, "devices"],
        ) -> CodeCounts:
            model = load(state)
            packed, packing = model.pack(images, mesh)
            return count(model, model.encode(scale(packed), packing), mask, levels)

        def metrics_step(
            state: TrainState,
            images: UInt8[Array, "batch height width channels"],
            mask: Bool[Array, "batch"],
            levels: Int32[Array, "devices"],
        ) -> tuple[dict[str, Float[Array, ""]], CodeCounts]:
            model = load(state)
            sums, codes = measure_images(model, images, mask, value_range, param_dtype, mesh)
            return sums, count(model, codes, mask, levels)

        def preview_step(
            state: TrainState, images: UInt8[Array, "batch height width channels"]
        ) -> tuple[Float[Array, "..."], Float[Array, "..."], dict[str, Array]]:
            model, inputs = load(state), scale(images)
            outputs, codes, _ = model(inputs)
            outputs = outputs.astype(param_dtype)
            a, b = (metrics.to_unit_range(x, value_range) for x in (inputs, outputs))
            return a, b, model.quantizer.histograms(codes)

        batch = (sharding.images_sharded(mesh), sharding.batch_sharded(mesh), by_device)
        jit = functools.partial(
            jax.jit,
            in_shardings=(whole, *batch),
            compiler_options=sharding.compiler_options(mesh),
        )
        self.usage_step = jit(usage_step, out_shardings=by_device)
        self.metrics_step = jit(metrics_step, out_shardings=(whole, by_device))
        self.preview_step = jax.jit(preview_step, in_shardings=(whole, whole), out_shardings=whole)

    def _results(
        self,
        step: Callable[..., Any],
        usage: CodebookUsage,
        data: Dataset,
        split: str,
        batch_size: int,
    ) -> Iterator[Any]:
        """The step's result for images, mask and levels of every batch, one behind the device."""
        num_images = data.num_images[split]
        batches = order.evaluation_batches(
            num_images,
            batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        previous: Any = None
        for batch, images in data.batches(split, batches):
            on_devices = (sharding.to_devices(x, self._mesh) for x in (images, batch.mask))
            current = step(*on_devices, usage.levels(self._mesh))
            if previous is not None:
                yield previous
            previous = current
        if previous is not None:
            yield previous

    def measure(
        self,
        state: TrainState,
        data: Dataset,
        split: str,
        batch_size: int,
        progress: ProgressFactory,
        usage: CodebookUsage,
        is_time_to_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Mean metrics over the images of a split, each counted once; their codes go to `usage`.

        None if, asked after a batch, `is_time_to_stop` says so.
        """
        report = progress(order.steps_per_epoch(data.num_images[split], batch_size))
        totals: dict[str, float] = {}
        step = functools.partial(self.metrics_step, state)
        results = self._results(step, usage, data, split, batch_size)
        for done, (sums, counts) in enumerate(results, start=1):
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
            usage.add(counts)
            report(done)
            if is_time_to_stop():
                return None
        means = {name: total / data.num_images[split] for name, total in totals.items()}
        return {"loss": means["reconstruction_loss"] + means["quantizer_loss"], **means}

    def measure_batch(
        self, state: TrainState, images: UInt8[Array, "batch height width channels"]
    ) -> tuple[float, CodebookUsage]:
        """Reconstruction + quantizer loss of one whole batch, and the codes it uses."""
        mask = np.ones(len(images) // jax.process_count(), bool)
        usage = CodebookUsage()
        sums, counts = self.metrics_step(
            state, images, sharding.to_devices(mask, self._mesh), usage.levels(self._mesh)
        )
        usage.add(counts)
        sums = jax.device_get(sums)
        loss = float(sums["reconstruction_loss"] + sums["quantizer_loss"]) / len(images)
        return loss, usage.over_all_hosts()

    def measure_usage(
        self,
        state: TrainState,
        data: Dataset,
        splits: Sequence[str],
        batch_size: int,
        progress: ProgressFactory,
        usage: CodebookUsage,
    ) -> None:
        """The codes of all images of some splits go to `usage`."""
        report = progress(
            sum(order.steps_per_epoch(data.num_images[split], batch_size) for split in splits)
        )
        step = functools.partial(self.usage_step, state)
        done = 0
        for split in splits:
            for counts in self._results(step, usage, data, split, batch_size):
                usage.add(counts)
                report(done := done + 1)

    def preview(
        self, state: TrainState, data: Dataset, split: str
    ) -> tuple[UInt8[np.ndarray, "height width channels"], dict[str, np.ndarray]]:
        """A picture of a split's first images above their reconstructions; histogram data."""
        index = np.arange(min(NUM_PICTURES, data.num_images[split]))
        batch = order.IndexBatch(index, np.zeros(len(index), bool), np.ones(len(index), bool))
        _, images = next(iter(data.batches(split, [batch])))
        on_devices = sharding.replicate(images, self._mesh)
        originals, reconstructions, histograms = jax.device_get(
            self.preview_step(state, on_devices)
        )
        return pictures.comparison(originals, reconstructions), histograms


def evaluate(
    config: Config,
    workdir: epath.PathLike,
    data: Dataset,
    *,
    checkpoint: epath.PathLike | None = None,
    progress: ProgressFactory = console.Progress,
) -> dict[str, Any]:
    """Evaluates a checkpoint; writes evaluation.json and reconstructions.png into the workdir.

    Reconstruction metrics are over the test split (over validation where there is none), codebook
    figures over train and validation, each image once and unflipped.

    Args:
      config: the run's config; `model`, `quantizer` and `dataset.name` must be the checkpoint's.
      workdir: where results go, and the run whose newest checkpoint is taken by default.
      data: the data set.
      checkpoint: another checkpoint to evaluate (see `checkpointing.find`).
      progress: makes, for a number of steps, what is called with the number done after each.

    Returns:
      What evaluation.json holds.

    Raises:
      UserError: if there is no such checkpoint, or it is of another model, or the workdir cannot
        be written to.
    """
    configuration.validate(config)
    configuration.check_image_shape(config, data.image_shape)
    batch_size = scaling.global_batch_size(config, jax.device_count())
    mesh = sharding.mesh_for_batches(batch_size, configuration.latent_height(config))
    checkpointing.require_writable(workdir)
    path, saved, state = checkpointing.load_newest(workdir if checkpoint is None else checkpoint)
    configuration.check_same_model(config, saved, str(path))
    state = sharding.replicate(state, mesh)

    model = checkpointing.model_of(config, state)
    graphdef, _, _ = train_state.split(model)
    evaluator = Evaluator(
        graphdef, config["model"]["value_range"], DTYPES[config["compute_dtype"]][1], mesh
    )
    split = "test" if "test" in data.num_images else "validation"
    logging.info("Evaluating %s on %d %s images", path, data.num_images[split], split)
    usage = CodebookUsage()
    of_split = usage if split in _COUNTED else CodebookUsage()
    means = evaluator.measure(state, data, split, batch_size, progress, of_split)
    assert means is not None  # nothing stops it
    logging.info("Counting the codes in use over train and validation")
    remaining = [name for name in _COUNTED if name != split]
    evaluator.measure_usage(state, data, remaining, batch_size, progress, usage)
    usage = usage.over_all_hosts()
    how = "exact" if usage.is_exact else f"estimated, ±{usage.standard_error:.2%}"
    logging.info(
        "%d distinct codes (%s) among %d vectors", usage.num_distinct, how, usage.num_vectors
    )
    picture, _ = evaluator.preview(state, data, split)

    height, width, _ = data.image_shape
    num_pixels = sum(data.num_images[name] for name in _COUNTED) * height * width
    results = {
        "dataset": config["dataset"]["name"],
        "quantizer": config["quantizer"]["name"],
        "checkpoint": _name(path, workdir),
        "step": int(state.step),
        "split": split,
        **means,
        "effective_codebook_size": usage.num_distinct,
        "effective_codebook_size_is_exact": usage.is_exact,
        "effective_codebook_size_relative_error": usage.standard_error,
        "num_quantized_vectors": usage.num_vectors,
        "perplexity": usage.perplexity,
        "entropy_bits_per_vector": usage.entropy,
        "entropy_error_bits": usage.entropy_standard_error,
        "bits_per_pixel": usage.entropy * usage.num_vectors / num_pixels,
    }
    if model.quantizer.code_width > 1:
        results["basis_directions_in_use"] = usage.num_entries_in_use
    if "num_epochs" in saved:  # an imported checkpoint does not know its run
        results["num_train_steps"] = configuration.num_train_steps(saved, data.num_images["train"])
    if jax.process_index() == 0:
        with _replacing(epath.Path(workdir) / "reconstructions.png") as file:
            pictures.write_png(file, picture)
        with _replacing(epath.Path(workdir) / _REPORT) as file:
            file.write_text(json.dumps(results, indent=2) + "\n")
    return results


@contextlib.contextmanager
def _replacing(path: epath.Path) -> Iterator[epath.Path]:
    """What is written to another file takes this one's place once it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


def _name(checkpoint: epath.Path, workdir: epath.PathLike) -> str:
    """Of a checkpoint in a workdir, relative to it, so that the workdir may be moved."""
    root = checkpointing.absolute(workdir)
    return os.fspath(checkpoint.relative_to(root) if root in checkpoint.parents else checkpoint)


def read_evaluation(workdir: epath.PathLike) -> dict[str, Any]:
    """What evaluation.json says of a run's newest checkpoint.

    Raises:
      UserError: if there is none, or it is of another checkpoint.
    """
    checkpoint, _, _ = checkpointing.load_newest(workdir)
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
