"""Evaluation: reconstruction metrics of a split, and the codebook's usage over splits."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from llvq import (
    checkpointing,
    configuration,
    console,
    metrics,
    order,
    sharding,
    train_state,
    visualize,
)
from llvq.codebook_usage import CodebookUsage, fingerprints
from llvq.configuration import Config
from llvq.data import Dataset
from llvq.model import VQVAE
from llvq.train_state import DTYPES, TrainState
from llvq.train_step import scale_images

ProgressFactory = Callable[[int], Callable[[int], Any]]

NUM_PICTURES = 8


class Evaluator:
    """The jitted steps of evaluation, and what goes over whole splits with them.

    Attributes (each a jitted function of state and images, uint8):
      usage_step: fingerprints of the codes, [vectors, 4], replicated.
      metrics_step: sums of each metric over the images that a mask lets count, and fingerprints.
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
        split, whole = sharding.batch_sharded(mesh), sharding.replicated(mesh)

        def load(state: TrainState, images: Array) -> tuple[VQVAE, Array]:
            model = nnx.merge(graphdef, state.params, state.statistics)
            return model, scale_images(images, value_range, param_dtype)

        def fingerprint(model: VQVAE, codes: Array) -> Array:
            return fingerprints(codes.reshape(-1, model.quantizer.code_width))

        def usage_step(
            state: TrainState, images: UInt8[Array, "batch height width channels"]
        ) -> UInt32[Array, "vectors 4"]:
            model, inputs = load(state, images)
            return fingerprint(model, model.encode(inputs))

        def metrics_step(
            state: TrainState,
            images: UInt8[Array, "batch height width channels"],
            mask: Bool[Array, "batch"],
        ) -> tuple[dict[str, Float[Array, ""]], UInt32[Array, "vectors 4"]]:
            model, inputs = load(state, images)
            outputs, codes, quantizer_losses = model(inputs, mask=mask)
            outputs = outputs.astype(param_dtype)
            a, b = (metrics.to_unit_range(x, value_range) for x in (inputs, outputs))
            by_image = {
                "reconstruction_loss": jnp.mean((outputs - inputs) ** 2, axis=(1, 2, 3)),
                "psnr": metrics.psnr(a, b),
                "ssim": metrics.ssim(a, b),
            }
            count = jnp.sum(mask)
            sums = {name: jnp.sum(x, where=mask) for name, x in by_image.items()}
            sums |= {name: loss * count for name, loss in quantizer_losses.items()}
            return sums, fingerprint(model, codes)

        def preview_step(
            state: TrainState, images: UInt8[Array, "batch height width channels"]
        ) -> tuple[Float[Array, "..."], Float[Array, "..."], dict[str, Array]]:
            model, inputs = load(state, images)
            outputs, codes, _ = model(inputs)
            outputs = outputs.astype(param_dtype)
            a, b = (metrics.to_unit_range(x, value_range) for x in (inputs, outputs))
            return a, b, model.quantizer.histograms(codes)

        self.usage_step = jax.jit(usage_step, in_shardings=(whole, split), out_shardings=whole)
        self.metrics_step = jax.jit(
            metrics_step, in_shardings=(whole, split, split), out_shardings=whole
        )
        self.preview_step = jax.jit(preview_step, in_shardings=(whole, whole), out_shardings=whole)

    def _results(
        self, step: Callable[..., Any], data: Dataset, split: str, batch_size: int
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(mask of all hosts, result) of every batch, one batch behind the device."""
        num_images = data.num_images[split]
        batches = order.evaluation_batches(
            num_images,
            batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        previous: tuple[np.ndarray, Any] | None = None
        for start, (batch, images) in zip(
            range(0, num_images, batch_size), data.batches(split, batches), strict=True
        ):
            mask = np.arange(start, start + batch_size) < num_images
            current = mask, step(sharding.to_devices(images, self._mesh), batch.mask)
            if previous is not None:
                yield previous[0], jax.device_get(previous[1])
            previous = current
        if previous is not None:
            yield previous[0], jax.device_get(previous[1])

    def measure(
        self,
        state: TrainState,
        data: Dataset,
        split: str,
        batch_size: int,
        progress: ProgressFactory,
    ) -> tuple[dict[str, float], CodebookUsage]:
        """Mean metrics over the images of a split, each counted once, and the codes it uses."""

        def step(images: Array, mask: np.ndarray) -> Any:
            return self.metrics_step(state, images, sharding.to_devices(mask, self._mesh))

        report = progress(order.steps_per_epoch(data.num_images[split], batch_size))
        totals: dict[str, float] = {}
        usage = CodebookUsage()
        for done, (mask, (sums, keys)) in enumerate(
            self._results(step, data, split, batch_size), start=1
        ):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            _add_masked(usage, keys, mask)
            report(done)
        means = {name: total / data.num_images[split] for name, total in totals.items()}
        return {"loss": means["reconstruction_loss"] + means["quantizer_loss"], **means}, usage

    def measure_batch(
        self, state: TrainState, images: UInt8[Array, "batch height width channels"]
    ) -> tuple[float, CodebookUsage]:
        """Reconstruction + quantizer loss of one whole batch, and the codes it uses."""
        mask = np.ones(len(images) // jax.process_count(), bool)
        sums, keys = jax.device_get(
            self.metrics_step(state, images, sharding.to_devices(mask, self._mesh))
        )
        usage = CodebookUsage()
        usage.add(keys)
        return float(sums["reconstruction_loss"] + sums["quantizer_loss"]) / len(images), usage

    def count_codes(
        self,
        state: TrainState,
        data: Dataset,
        splits: tuple[str, ...],
        batch_size: int,
        progress: ProgressFactory,
    ) -> CodebookUsage:
        """The codes in use over all images of some splits."""
        report = progress(
            sum(order.steps_per_epoch(data.num_images[split], batch_size) for split in splits)
        )
        usage = CodebookUsage()
        done = 0
        for split in splits:
            for mask, keys in self._results(
                lambda images, _: self.usage_step(state, images), data, split, batch_size
            ):
                _add_masked(usage, keys, mask)
                report(done := done + 1)
        return usage

    def preview(
        self, state: TrainState, data: Dataset, split: str
    ) -> tuple[UInt8[np.ndarray, "height width channels"], dict[str, np.ndarray]]:
        """A picture of a split's first images above their reconstructions; histogram data."""
        index = np.arange(min(NUM_PICTURES, data.num_images[split]))
        batch = order.IndexBatch(index, np.zeros(len(index), bool), np.ones(len(index), bool))
        _, images = next(iter(data.batches(split, [batch])))
        on_devices = jax.device_put(images, sharding.replicated(self._mesh))
        originals, reconstructions, histograms = jax.device_get(
            self.preview_step(state, on_devices)
        )
        return visualize.comparison(originals, reconstructions), histograms


def _add_masked(usage: CodebookUsage, keys: np.ndarray, mask: np.ndarray) -> None:
    usage.add(keys.reshape(len(mask), -1, 4)[mask].reshape(-1, 4))


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
    mesh = sharding.make_mesh()
    batch_size = config["batch_size"]
    sharding.check_batch_size(batch_size, mesh)
    checkpointing.require_writable(workdir)
    path = checkpointing.find(workdir if checkpoint is None else checkpoint)
    saved, state = checkpointing.load(path)
    configuration.check_same_model(config, saved, str(path))
    state = jax.device_put(state, sharding.replicated(mesh))

    graphdef, _, _ = train_state.split(checkpointing.model_of(config, state))
    evaluator = Evaluator(
        graphdef, config["model"]["value_range"], DTYPES[config["compute_dtype"]][1], mesh
    )
    split = "test" if "test" in data.num_images else "validation"
    logging.info("Evaluating %s on %d %s images", path, data.num_images[split], split)
    means, _ = evaluator.measure(state, data, split, batch_size, progress)
    logging.info("Counting the codes in use over train and validation")
    usage = evaluator.count_codes(state, data, ("train", "validation"), batch_size, progress)
    picture, _ = evaluator.preview(state, data, split)

    results = {
        "dataset": config["dataset"]["name"],
        "quantizer": config["quantizer"]["name"],
        "checkpoint": str(path),
        "step": int(state.step),
        "split": split,
        **means,
        "effective_codebook_size": usage.num_distinct,
        "num_quantized_vectors": usage.num_vectors,
        "perplexity": usage.perplexity,
    }
    if jax.process_index() == 0:
        directory = epath.Path(workdir)
        visualize.write_png(directory / "reconstructions.png", picture)
        (directory / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    return results
