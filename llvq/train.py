"""The training loop, which starts at step 0 or resumes from the newest checkpoint."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.profiler import StepTraceAnnotation, TraceAnnotation
from jax.sharding import Mesh

from llvq import checkpointing
from llvq.config import (
    ConfigLike,
    TrainConfig,
    check_data,
    check_initial,
    check_resumable,
    derive,
    num_train_steps,
    of_saved,
    parse,
    to_dict,
    to_markdown,
    to_saved,
)
from llvq.data import Dataset
from llvq.data.order import steps_per_epoch, training_batches
from llvq.errors import DivergenceError, UserError
from llvq.evaluation.evaluator import Evaluator
from llvq.fields import flatten
from llvq.runtime import console, preemption, sharding
from llvq.training import feeding, schedules, train_state
from llvq.training.feeding import Call
from llvq.training.meters import MetricsWindow, Throughput
from llvq.training.train_state import TrainState
from llvq.training.train_step import Metrics, make_train_step
from llvq.usage import CodebookUsage

_STOPPED = "stopped by SIGTERM, saved at step {}; the same command resumes from there"


class Validation(NamedTuple):
    """The findings of a validation.

    Attributes:
      scalars: by name; `reconstruction_loss` ranks the checkpoint (see `checkpointing`).
      images: [n, height, width, channels] by name, uint8.
      histograms: arrays by name whose distribution is worth watching.
    """

    scalars: dict[str, float]
    images: Mapping[str, np.ndarray]
    histograms: Mapping[str, np.ndarray]


class Task(Protocol):
    """All that the loop has to know of a model and its training.

    Attributes:
      state: what the run starts or resumes from: a pytree whose `step` counts the steps done. The
        first step may reuse its memory.
      num_steps: the step at which the run ends.
      images_per_step: over all devices and hosts.
    """

    state: Any
    num_steps: int
    images_per_step: int

    def describe(self) -> str:
        """One line for the log about what is trained."""
        ...

    def calls(self) -> Iterator[Call]:
        """The calls of the step, from the state's step to the last."""
        ...

    def step(self, state: Any, call: Call) -> tuple[Any, Metrics]:
        """The state after a call, which may reuse the old one's memory, and the metrics."""
        ...

    def measure_batch(self, state: Any, call: Call) -> dict[str, float]:
        """Figures of a call's last batch after the call; "loss" shows whether it diverged."""
        ...

    def validate(self, state: Any, is_time_to_stop: Callable[[], bool]) -> Validation | None:
        """Validates a state; None if it had to stop."""
        ...


def train_and_evaluate(
    config: ConfigLike,
    workdir: epath.PathLike,
    data: Dataset,
    *,
    make_writer: Callable[[], Any] = console.ConsoleWriter,
) -> TrainState:
    """Trains a VQ-VAE from the newest checkpoint of the workdir, or from its start, to its end.

    Validates and saves as often as the config says, and at the end. The result depends on the
    config and the data alone, not on how often the run was stopped and resumed.

    Args:
      config: the run's config.
      workdir: where checkpoints are kept.
      data: the data set; needs the splits "train" and "validation".
      make_writer: makes the clu MetricWriter, or the like, that takes scalars, images, histograms
        and texts. It is called once it is sure that there is something to train.

    Returns:
      The final state.

    Raises:
      UserError: if the config is impossible, the data set lacks a split, or the workdir cannot be
        written to or holds another run.
      DivergenceError: if loss or gradient become NaN or infinite.
      Preempted: after SIGTERM; a SystemExit.
    """
    config = parse(config)
    check_data(config, data)
    is_new = not (epath.Path(workdir) / "checkpoints").exists()
    if config.init_from and is_new:  # before a workdir is made
        checkpointing.find(config.init_from, "name another one with --config.init_from")
    checkpointing.require_writable(workdir)
    num_devices = jax.device_count()

    def make_like(saved: Mapping[str, Any]) -> TrainState:
        would_use = derive(config, num_devices, of_saved(saved)["batch_size"])
        check_resumable(would_use, saved, os.fspath(workdir))
        return train_state.abstract_train_state(train_state.abstract_model(would_use.architecture))

    saved = checkpointing.resume(workdir, make_like)
    batch_size = of_saved(saved.config)["batch_size"] if saved else None
    derived = derive(config, num_devices, batch_size)
    mesh = sharding.mesh_for_batches(derived.batch_size, derived.latent_shape[0])
    task = VQVAETask(derived, data, mesh, saved.state if saved else _start(derived))
    return run(task, derived, workdir, mesh, to_saved(config, derived), make_writer)


def _start(config: TrainConfig) -> TrainState:
    """The state that a new run starts from."""
    state = train_state.create_train_state(
        train_state.create_model(config.architecture, config.seed)
    )
    if not config.init_from:
        return state
    found = checkpointing.load(config.init_from)
    check_initial(config, found.config, f"init_from={found.path}")
    logging.info("Starting from the parameters of %s", found.path)
    params, statistics = jax.tree.map(
        lambda loaded, fresh: loaded.astype(fresh.dtype),
        (found.state.params, found.state.statistics),
        (state.params, state.statistics),
    )
    return state.replace(params=params, statistics=statistics)


class VQVAETask:
    """A VQ-VAE and the data that it is trained on; see `Task`."""

    def __init__(self, config: TrainConfig, data: Dataset, mesh: Mesh, state: TrainState) -> None:
        """Args:
        config: what the run uses; see `config.derive`.
        data: the data set.
        mesh: the devices.
        state: what the run starts or resumes from.
        """
        self.images_per_step = config.batch_size
        self._config, self._data, self._mesh = config, data, mesh
        self._num_images = data.num_images["train"]
        self.num_steps = num_train_steps(config, self._num_images)
        name, rate = config.schedule, config.learning_rate
        per_epoch = steps_per_epoch(self._num_images, config.batch_size)
        schedule = schedules.create(name, rate, per_epoch, self.num_steps)
        self._num_active = schedules.num_active_steps(name, rate, per_epoch, self.num_steps)

        self.state = jax.device_put(state, sharding.replicated(mesh))
        self._first_step = int(state.step)
        stops = self._first_step, self._num_active, self.num_steps
        self._per_call = feeding.steps_per_call(config, stops, mesh)
        self._images = data.resident("train") if self._per_call > 1 else None

        model = train_state.abstract_model(config.architecture)
        train_state.fit_to_mesh(model, mesh, config.latent_shape)
        graphdef = nnx.graphdef(model)
        self._evaluator = Evaluator(graphdef, mesh)
        self._train_step, self._statistics_step = make_train_step(
            graphdef,
            schedule,
            mesh,
            seed=config.seed,
            warmup_steps=model.quantizer.loss_warmup * self.num_steps,
            several=self._images is not None,
        )

    def describe(self) -> str:
        num_parameters = train_state.num_parameters((self.state.params, self.state.statistics))
        return (
            f"{num_parameters} parameters "
            f"({train_state.num_quantizer_parameters(self.state)} of them the quantizer's), "
            f"{self._mesh.size} device(s), {self._per_call if self._images is not None else 1} "
            "step(s) per call"
        )

    def calls(self) -> Iterator[Call]:
        index_batches = training_batches(
            self._num_images,
            self.images_per_step,
            seed=self._config.seed,
            first_step=self._first_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        first, last, mesh = self._first_step, self.num_steps, self._mesh
        if self._images is None:
            return feeding.one_by_one(self._data, index_batches, first, last, mesh)
        return feeding.several(self._images, index_batches, first, last, mesh, self._per_call)

    def step(self, state: TrainState, call: Call) -> tuple[TrainState, Metrics]:
        is_active = call.last_step <= self._num_active
        return (self._train_step if is_active else self._statistics_step)(state, *call.inputs)

    def measure_batch(self, state: TrainState, call: Call) -> dict[str, float]:
        loss, usage = self._evaluator.measure_batch(state, call.last_images())
        return {"loss": loss, **_usage_figures(usage)}

    def validate(self, state: TrainState, is_time_to_stop: Callable[[], bool]) -> Validation | None:
        usage = CodebookUsage()
        means = self._evaluator.measure(
            state, self._data, "validation", self.images_per_step, usage, is_time_to_stop
        )
        if means is None:
            return None
        picture, histograms = self._evaluator.preview(state, self._data, "validation")
        return Validation(
            {**means, **_usage_figures(usage.over_all_hosts())},
            {"reconstructions": picture[None]},
            histograms,
        )


def _usage_figures(usage: CodebookUsage) -> dict[str, float]:
    return {"perplexity": usage.perplexity, "distinct_codes": usage.num_distinct}


def run(
    task: Task,
    config: TrainConfig,
    workdir: epath.PathLike,
    mesh: Mesh,
    saved_config: Mapping[str, Any],
    make_writer: Callable[[], Any],
) -> Any:
    """Trains a task to its end: logs, validates, saves, and stops when it has to.

    On SIGTERM it saves after the present call, or one of the next two if there are several
    processes, and raises Preempted.

    Args:
      task: what is trained.
      config: says how often something follows a step, and which checkpoints are kept.
      workdir: where checkpoints are kept.
      mesh: the devices.
      saved_config: what checkpoints hold as their config.
      make_writer: as for `train_and_evaluate`.

    Returns:
      The final state.

    Raises:
      UserError, DivergenceError, Preempted: as for `train_and_evaluate`.
    """
    first_step = int(task.state.step)
    with (
        preemption.stop_at_a_step(mesh) as is_time_to_stop,
        checkpointing.open_manager(workdir, config.keep_checkpoints) as checkpoints,
    ):
        if first_step >= task.num_steps:
            logging.info("Nothing to train: %s is at step %d already", workdir, first_step)
            return task.state
        verb = "Resuming" if first_step else "Starting"
        logging.info("%s at step %d of %d: %s", verb, first_step, task.num_steps, task.describe())
        with (
            _closing(make_writer()) as writer,
            console.Progress(task.num_steps, "training", first_step) as report,
        ):
            hparams = flatten(to_dict(config))
            writer.write_hparams({name: _hparam(value) for name, value in hparams.items()})
            texts = {"config": to_markdown(saved_config), "machine": sharding.describe(mesh)}
            writer.write_texts(first_step, texts)
            return _loop(task, config, saved_config, checkpoints, writer, report, is_time_to_stop)


@contextlib.contextmanager
def _closing(writer: Any) -> Iterator[Any]:
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(UserError):  # what has ended the training matters more
            writer.close()
        raise
    writer.close()


def _hparam(value: Any) -> int | float | str:
    return value if isinstance(value, int | float | str) else str(value)


def _loop(
    task: Task,
    config: TrainConfig,
    saved_config: Mapping[str, Any],
    checkpoints: Any,
    writer: Any,
    report: Callable[..., None],
    is_time_to_stop: Callable[[], bool],
) -> Any:
    state, first_step = task.state, int(task.state.step)
    describe_last_checkpoint = functools.partial(checkpointing.describe_newest, checkpoints)
    window = MetricsWindow(describe_last_checkpoint)
    throughput = Throughput(task.images_per_step)

    # SIGTERM cuts a validation short: it is made up for here.
    is_due = first_step > 0 and first_step % config.eval_every_steps == 0
    if is_due and checkpoints.metrics(first_step) is None:
        validation = _validate(task, state, first_step, writer, is_time_to_stop)
        if validation is None:
            raise preemption.Preempted(_STOPPED.format(first_step))

    started = time.monotonic()
    for call in task.calls():
        step, is_end = call.last_step, call.last_step == task.num_steps
        called = time.monotonic()
        with StepTraceAnnotation("train", step_num=step):
            state, metrics = task.step(state, call)
        if step - call.num_steps == first_step:
            compiled = time.monotonic()
            jax.block_until_ready(metrics)
            figures = (
                f"compiled in {compiled - called:.1f} s; the first step was done "
                f"{time.monotonic() - started:.1f} s after the start of training"
            )
            logging.info("Step %d: %s", step, figures)
            writer.write_texts(step, {"start": figures})
        window.add(step, metrics)
        throughput.count(call.num_steps)
        report(step, loss=window.latest.get("loss"))

        is_stopping = is_time_to_stop()
        is_log = is_end or step % config.log_every_steps == 0
        is_evaluation = is_end or step % config.eval_every_steps == 0
        is_checkpoint = is_end or step % config.checkpoint_every_steps == 0
        if not (is_log or is_evaluation or is_checkpoint or is_stopping):
            continue

        window.read()  # nothing that diverged is logged or saved
        rates = throughput.finish()
        # The last update may have ruined the state.
        with TraceAnnotation("measure_batch"):
            batch_figures = task.measure_batch(state, call)
        loss = batch_figures.pop("loss")
        if not np.isfinite(loss):
            raise DivergenceError(
                f"the loss is {loss} after step {step}: stopped; {describe_last_checkpoint()}"
            )
        if is_log:
            figures_by_name = {**window.finish(), **batch_figures, **rates}
            writer.write_scalars(step, _prefixed("train", figures_by_name))
        validation = None
        if is_evaluation and not is_stopping:
            validation = _validate(task, state, step, writer, is_time_to_stop)
            is_stopping = validation is None
        if is_checkpoint or is_stopping:
            with TraceAnnotation("save"):
                checkpointing.save(
                    checkpoints,
                    step,
                    state,
                    saved_config,
                    validation,
                    stop_on_failure=config.stop_on_failed_save,
                    is_last=is_stopping or is_end,
                )
        if is_stopping:
            raise preemption.Preempted(_STOPPED.format(step))
        throughput.restart()
    return state


def _validate(
    task: Task, state: Any, step: int, writer: Any, is_time_to_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Validates and reports; the figures, or None if it had to stop."""
    logging.info("Validating at step %d", step)
    validation = task.validate(state, is_time_to_stop)
    if validation is None:
        return None
    writer.write_scalars(step, _prefixed("validation", validation.scalars))
    writer.write_images(step, _prefixed("validation", validation.images))
    writer.write_histograms(step, _prefixed("validation", validation.histograms))
    return validation.scalars


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
