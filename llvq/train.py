"""The training loop, which starts at step 0 or resumes from the newest checkpoint."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax.profiler import StepTraceAnnotation, TraceAnnotation
from jax.sharding import Mesh

from llvq import checkpointing
from llvq.config import ConfigLike, TrainConfig, parse, to_dict
from llvq.data import Dataset
from llvq.data.dataset import check_data
from llvq.data.order import steps_per_epoch, training_batches
from llvq.errors import DivergenceError, UserError
from llvq.evaluation.evaluator import Evaluator
from llvq.fields import LARGEST, flatten
from llvq.models import VQVAE, factory
from llvq.quantizers.registry import loss_warmup
from llvq.runtime import console, preemption, sharding
from llvq.training import feeding, schedules, train_state
from llvq.training import optimizer as optimizers
from llvq.training.feeding import Call
from llvq.training.meters import MetricsWindow, Throughput
from llvq.training.objective import Objective
from llvq.training.train_state import TrainState
from llvq.training.train_step import Metrics, make_train_step
from llvq.usage import CodebookUsage

_STOPPED = "stopped by SIGTERM, saved at step {}; the same command resumes from there"


class Validation(NamedTuple):
    """Results of a validation.

    Attributes:
      scalars: by name; that of the task's `ranking` ranks the checkpoint.
      images: [n, height, width, channels] by name, uint8.
      histograms: arrays by name to log as histograms.
    """

    scalars: dict[str, float]
    images: Mapping[str, np.ndarray]
    histograms: Mapping[str, np.ndarray]


class Task(Protocol):
    """The interface between the loop and what is trained.

    Attributes:
      ranking: the name of the figure of validation that ranks checkpoints; lower is better.
      state: what the run starts or resumes from: a pytree whose `step` counts the steps done. The
        first step may reuse its memory.
      num_steps: the step at which the run ends.
      images_per_step: over all devices and hosts.
    """

    ranking: str
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


class Intervals(NamedTuple):
    """After how many steps something is done.

    Attributes:
      log: metrics are logged.
      evaluate: the task is validated.
      checkpoint: the state is saved.
    """

    log: int
    evaluate: int
    checkpoint: int


def train_and_evaluate(
    config: ConfigLike,
    workdir: epath.PathLike,
    data: Dataset,
    *,
    optimizer: optax.GradientTransformation | None = None,
    make_writer: Callable[[], Any] = console.ConsoleWriter,
) -> TrainState:
    """Trains a VQ-VAE from the newest checkpoint of the workdir, or from its start, to its end.

    Validates and saves as often as the config says, and at the end. The result depends on the
    config and the data alone, not on how often the run was stopped and resumed.

    Args:
      config: the run's config.
      workdir: where checkpoints are kept.
      data: the data set; needs the splits "train" and "validation".
      optimizer: takes the place of the config's, with a learning rate of its own.
      make_writer: makes the clu MetricWriter, or the like, that takes scalars, images, histograms
        and texts. It is called only if there is something to train.

    Returns:
      The final state.

    Raises:
      UserError: if the config is impossible, the data set lacks a split, or the workdir cannot be
        written to or holds another run.
      DivergenceError: if loss or gradient become NaN or infinite.
      Preempted: after SIGTERM; a SystemExit.
    """
    config = parse(config)
    check_data(data, config.model.image_shape)
    is_new = not (epath.Path(workdir) / "checkpoints").exists()
    if config.init_from and is_new:  # before a workdir is made
        checkpointing.find(config.init_from, "name another one with --config.init_from")
    checkpointing.require_writable(workdir)
    num_images = data.num_images["train"]
    num_steps = num_train_steps(config, num_images)
    per_epoch = steps_per_epoch(num_images, config.batch_size)
    schedule = schedules.SCHEDULES[config.schedule](config.learning_rate, per_epoch, num_steps)
    if optimizer is None:
        of_config = config.optimizer
        optimizer = optimizers.create(
            of_config.name, of_config.options, schedule, of_config.clip_norm
        )

    def make_like(saved: Mapping[str, Any]) -> TrainState:
        checkpointing.check_resumable(config, checkpointing.from_saved(saved), workdir)
        architecture = config.architecture
        return jax.eval_shape(
            lambda: _create_state(config, factory.create_model(architecture, 0), optimizer)
        )

    state = checkpointing.resume(workdir, make_like)
    model = factory.abstract_model(config.architecture)
    latent_height, _ = factory.latent_shape(model, config.model.image_shape)
    mesh = sharding.mesh_for_batches(config.batch_size, latent_height)
    if state is None:
        state = _start(config, optimizer)
    task = VQVAETask(config, data, mesh, state, optimizer, schedule, num_steps)
    return run(
        task,
        workdir,
        mesh,
        _intervals(config),
        to_dict(config),
        make_writer,
        keep_checkpoints=config.keep_checkpoints,
        stop_on_failed_save=config.stop_on_failed_save,
    )


def _intervals(config: TrainConfig) -> Intervals:
    return Intervals(config.log_every_steps, config.eval_every_steps, config.checkpoint_every_steps)


def num_train_steps(config: TrainConfig, num_images: int) -> int:
    """Returns the number of steps of a run on a data set of this size.

    Raises:
      UserError: if there are too many to be counted.
    """
    per_epoch = steps_per_epoch(num_images, config.batch_size)
    num_steps = config.num_train_steps or config.num_epochs * per_epoch
    if num_steps > LARGEST:
        raise UserError(
            f"config.num_epochs={config.num_epochs}: must be at most {LARGEST // per_epoch}, as an "
            f"epoch has {per_epoch} steps"
        )
    return num_steps


def _create_state(
    config: TrainConfig, model: VQVAE, optimizer: optax.GradientTransformation
) -> TrainState:
    keeps_averages = config.optimizer.ema_decay > 0
    return train_state.create_train_state(model, optimizer, keeps_averages=keeps_averages)


def _start(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state that a new run starts from."""
    model = factory.create_model(config.architecture, config.seed)
    if config.init_from:
        found = checkpointing.load(config.init_from)
        checkpointing.check_initial(config, found.config, f"init_from={found.path}")
        logging.info("Starting from the parameters of %s", found.path)
        graphdef, *fresh = factory.split(model)
        loaded = found.state.params, found.state.statistics
        model = nnx.merge(
            graphdef, *jax.tree.map(lambda old, new: old.astype(new.dtype), loaded, tuple(fresh))
        )
    return _create_state(config, model, optimizer)


class VQVAETask:
    """A VQ-VAE and the data that it is trained on; see `Task`."""

    # Not the total loss, which contains −γ·Σ|b| for a lattice.
    ranking = "reconstruction_loss"

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        mesh: Mesh,
        state: TrainState,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        num_steps: int,
    ) -> None:
        """Args:
        config: of the run.
        data: the data set.
        mesh: the devices.
        state: what the run starts or resumes from.
        optimizer: of the run.
        schedule: of the learning rate, which is reported.
        num_steps: the step at which the run ends.
        """
        self.images_per_step = config.batch_size
        self.num_steps = num_steps
        self._config, self._data, self._mesh = config, data, mesh
        self._num_images = data.num_images["train"]
        self._num_active = schedules.num_active_steps(
            config.schedule,
            config.learning_rate,
            steps_per_epoch(self._num_images, config.batch_size),
            num_steps,
        )

        self.state = jax.device_put(state, sharding.replicated(mesh))
        self._first_step = int(state.step)
        stops = self._first_step, self._num_active, num_steps, *_intervals(config)
        self._per_call = feeding.steps_per_call(config.steps_per_call, stops, mesh)
        self._images = data.resident("train") if self._per_call > 1 else None

        model = factory.abstract_model(config.architecture)
        factory.fit_to_mesh(model, mesh, config.model.image_shape)
        graphdef = nnx.graphdef(model)
        objective = Objective(config.loss, config.loss_options)
        self._evaluator = Evaluator(graphdef, objective, mesh)
        self._train_step, self._statistics_step = make_train_step(
            graphdef,
            objective,
            optimizer,
            schedule,
            mesh,
            seed=config.seed,
            warmup_steps=loss_warmup(config.quantizer.options) * num_steps,
            accumulate_steps=config.optimizer.accumulate_steps,
            ema_decay=config.optimizer.ema_decay,
            several=self._images is not None,
        )

    def describe(self) -> str:
        num_parameters = factory.num_parameters((self.state.params, self.state.statistics))
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
    workdir: epath.PathLike,
    mesh: Mesh,
    intervals: Intervals,
    config: Mapping[str, Any],
    make_writer: Callable[[], Any],
    *,
    keep_checkpoints: int,
    stop_on_failed_save: bool,
) -> Any:
    """Trains a task to its end: logs, validates, saves, and stops when it has to.

    On SIGTERM it saves after the present call, or one of the next two if there are several
    processes, and raises Preempted.

    Args:
      task: what is trained.
      workdir: where checkpoints are kept.
      mesh: the devices.
      intervals: between logs, validations and checkpoints.
      config: of the run, as nested dicts, for checkpoints and logs.
      make_writer: as for `train_and_evaluate`.
      keep_checkpoints: how many of the newest are kept.
      stop_on_failed_save: whether a checkpoint that cannot be saved ends the run.

    Returns:
      The final state.

    Raises:
      UserError, DivergenceError, Preempted: as for `train_and_evaluate`.
    """
    first_step = int(task.state.step)
    with (
        preemption.stop_at_a_step(mesh) as is_time_to_stop,
        checkpointing.open_manager(workdir, keep_checkpoints, task.ranking) as checkpoints,
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
            values = flatten(config)
            writer.write_hparams({name: _hparam(value) for name, value in values.items()})
            rows = [(name, str(value)) for name, value in values.items()]
            table = console.markdown_table(("field", "value"), rows)
            writer.write_texts(first_step, {"config": table, "machine": sharding.describe(mesh)})
            save = functools.partial(
                checkpointing.save, checkpoints, config=config, stop_on_failure=stop_on_failed_save
            )
            return _loop(task, intervals, checkpoints, save, writer, report, is_time_to_stop)


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
    intervals: Intervals,
    checkpoints: Any,
    save: Callable[..., None],
    writer: Any,
    report: Callable[..., None],
    is_time_to_stop: Callable[[], bool],
) -> Any:
    state, first_step = task.state, int(task.state.step)
    describe_last_checkpoint = functools.partial(checkpointing.describe_newest, checkpoints)
    window = MetricsWindow(describe_last_checkpoint)
    throughput = Throughput(task.images_per_step)

    # SIGTERM cuts a validation short: it is repeated here.
    is_due = first_step > 0 and first_step % intervals.evaluate == 0
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
        is_log = is_end or step % intervals.log == 0
        is_evaluation = is_end or step % intervals.evaluate == 0
        is_checkpoint = is_end or step % intervals.checkpoint == 0
        if not (is_log or is_evaluation or is_checkpoint or is_stopping):
            continue

        window.read()  # nothing that diverged is logged or saved
        rates = throughput.finish()
        # The last update may have produced NaNs in the state.
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
                save(step, state, metrics=validation, is_last=is_stopping or is_end)
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
