"""Passes over whole splits with the steps of evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from llvq.data import Dataset, IndexBatch
from llvq.data.order import evaluation_batches, steps_per_epoch
from llvq.evaluation import metrics, pictures
from llvq.evaluation.steps import make_steps
from llvq.models import VQVAE
from llvq.runtime import console, sharding
from llvq.training.objective import Objective
from llvq.training.train_state import TrainState
from llvq.usage import CodebookUsage, CodeCounts

NUM_PICTURES = 8


class Evaluator:
    """Evaluates a model on the devices of a mesh."""

    def __init__(self, graphdef: nnx.GraphDef[VQVAE], objective: Objective, mesh: Mesh) -> None:
        """Args:
        graphdef: the model's structure (see `factory.split`), fitted to the mesh.
        objective: what is minimised in training.
        mesh: the devices.
        """
        self._mesh = mesh
        self._steps = make_steps(graphdef, objective, mesh)

    def measure(
        self,
        state: TrainState,
        data: Dataset,
        split: str,
        batch_size: int,
        usage: CodebookUsage,
        is_time_to_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """The figures of a split, each image counted once; its codes go to `usage`.

        Returns None if `is_time_to_stop` says so after a batch that is not the last.
        """
        totals: dict[str, float] = {}
        num_batches = steps_per_epoch(data.num_images[split], batch_size)
        with console.Progress(num_batches, f"measuring {split}") as report:
            results = self._results(state, usage, data, split, batch_size)
            for done, (sums, counts) in enumerate(results, start=1):
                for name, value in jax.device_get(sums).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
                usage.add(counts)
                report(done)
                if done < num_batches and is_time_to_stop():
                    return None
        return metrics.finish(totals, data.num_images[split])

    def measure_batch(
        self, state: TrainState, images: UInt8[Array, "batch height width channels"]
    ) -> tuple[float, CodebookUsage]:
        """Measures the loss of one whole batch, and the codes it uses."""
        mask = np.ones(len(images) // jax.process_count(), bool)
        usage = CodebookUsage()
        sums, counts = self._steps.measure(
            state, images, sharding.to_devices(mask, self._mesh), usage.levels(self._mesh)
        )
        usage.add(counts)
        totals = {name: float(value) for name, value in jax.device_get(sums).items()}
        return metrics.finish(totals, len(images))["loss"], usage.over_all_hosts()

    def preview(
        self, state: TrainState, data: Dataset, split: str
    ) -> tuple[UInt8[np.ndarray, "height width channels"], dict[str, np.ndarray]]:
        """A picture of a split's first images above their reconstructions; histogram data."""
        index = np.arange(min(NUM_PICTURES, data.num_images[split]))
        batch = IndexBatch(index, np.zeros(len(index), bool), np.ones(len(index), bool))
        _, images = next(iter(data.batches(split, [batch])))
        on_devices = sharding.replicate(images, self._mesh)
        originals, reconstructions, histograms = jax.device_get(
            self._steps.preview(state, on_devices)
        )
        return pictures.comparison(originals, reconstructions), histograms

    def _results(
        self,
        state: TrainState,
        usage: CodebookUsage,
        data: Dataset,
        split: str,
        batch_size: int,
    ) -> Iterator[tuple[dict[str, Float[Array, ""]], CodeCounts]]:
        """Yields the result of `measure` for each batch while the device computes the next one."""
        batches = evaluation_batches(
            data.num_images[split],
            batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        previous: Any = None
        for batch, images in data.batches(split, batches):
            current = self._steps.measure(
                state,
                sharding.to_devices(images, self._mesh),
                sharding.to_devices(batch.mask, self._mesh),
                usage.levels(self._mesh),
            )
            if previous is not None:
                yield previous
            previous = current
        if previous is not None:
            yield previous
