"""Training: the loop from the first or the last saved step to the last."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from llvq import checkpointing, scaling
from llvq import config as configuration
from llvq.config import Config
from llvq.data import Dataset, order
from llvq.errors import DivergenceError
from llvq.evaluate import Evaluator, ProgressFactory
from llvq.runtime import console, preemption, sharding
from llvq.training import feeding, schedules, train_state
from llvq.training.train_state import TrainState
from llvq.training.train_step import Metrics, make_train_step
from llvq.usage.table import CodebookUsage

_STOPPED = "stopped by SIGTERM, saved at step {}; the same command goes on from there"


class _MetricsWindow:
    """Means of the train metrics since the last log, read one call behind the device."""

    def __init__(self, describe_last_checkpoint: Callable[[], str]) -> None:
        self._describe_last_checkpoint = describe_last_checkpoint
        self._waiting: tuple[int, Metrics] | None = None
        self._values: dict[str, list[float]] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a call of one step or several, up to the step of that number.

        Raises DivergenceError if a step of the call before it diverged.
        """
        self.read()
        self._waiting = step, metrics

    def read(self) -> None:
        """Waits for the last call; raises DivergenceError if loss or gradient are not finite."""
        if self._waiting is None:
            return
        last_step, metrics = self._waiting
        self._waiting = None
        of_steps = {name: np.atleast_1d(values) for name, values in jax.device_get(metrics).items()}
        num_steps = len(of_steps["loss"])
        for i, step in enumerate(range(last_step - num_steps + 1, last_step + 1)):
            for name, values in of_steps.items():
                value = values[i]
                if not np.isfinite(value):
                    raise DivergenceError(
                        f"{name} is {value} at step {step}: stopped; "
                        f"{self._describe_last_checkpoint()}"
                    )
                self._values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        """The mean of each metric over the steps that had it; the window starts anew."""
        means = {name: float(np.mean(values)) for name, values in self._values.items()}
        self._values = {}
        return means


class _Throughput:
    """Steps and images a second; evaluation, checkpoints and compilation do not count."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._start: float | None = None
        self._steps = 0

    def count_steps(self, num_steps: int) -> None:
        """Call after so many steps; the first ones only start the clock, they compile."""
        if self._start is None:
            self._start = time.monotonic()
        else:
            self._steps += num_steps

    def read(self) -> dict[str, float]:
        """The rates since the last reading, if there were steps."""
        if self._start is None or not self._steps:
            return {}
        rate = self._steps / (time.monotonic() - self._start)
        self.restart()
        return {"steps_per_second": rate, "images_per_second": rate * self._batch_size}

    def restart(self) -> None:
        """Leaves out the time since the last step."""
        self._start, self._steps = time.monotonic(), 0


def train_and_evaluate(
    config: Config,
    workdir: epath.PathLike,
    data: Dataset,
    *,
    make_writer: Callable[[], Any] = console.ConsoleWriter,
    progress: ProgressFactory = console.Progress,
) -> TrainState:
    """Trains from the newest checkpoint of the workdir, or from scratch, to the config's last step.

    Validates and saves as often as the config says, and at the end. The result depends on the
    config and the data alone, not on how often the run was stopped and resumed. On SIGTERM it
    saves after the present call of one step or several (see `feeding`), or one of the next two if
    there are several processes, and raises Preempted.

    Args:
      config: the run's config.
      workdir: where checkpoints are kept.
      data: the data set; needs the splits "train" and "validation".
      make_writer: makes what takes scalars, images, histograms and texts, a clu MetricWriter or
        the like, once it is sure that there is something to train; a ConsoleWriter by default.
      progress: makes, for a number of steps, what is called with the number done after each call.

    Returns:
      The final state.

    Raises:
      UserError: if the config is impossible, or the workdir cannot be written to or holds
        another run.
      DivergenceError: if loss or gradient become NaN or infinite.
      Preempted: after SIGTERM; a SystemExit.
    """
    started = time.monotonic()
    configuration.validate(config)
    configuration.check_image_shape(config, data.image_shape)
    config = scaling.scale(config, jax.device_count(), checkpointing.saved_batch_size(workdir))
    batch_size = config["batch_size"]
    mesh = sharding.mesh_for_batches(batch_size, configuration.latent_height(config))
    checkpointing.require_writable(workdir)

    num_images = data.num_images["train"]
    num_steps = configuration.num_train_steps(config, num_images)
    schedule = schedules.create(
        config["schedule"],
        config["learning_rate"],
        order.steps_per_epoch(num_images, batch_size),
        num_steps,
    )
    learning_rates = schedules.tabulate(schedule, num_steps)
    optimizer = optax.adam(schedule)
    model = train_state.create_model(
        config["model"], config["quantizer"], config["compute_dtype"], config["seed"]
    )
    graphdef, state = train_state.create_train_state(model, optimizer)
    state = sharding.replicate(state, mesh)
    shared = (config["model"]["value_range"], train_state.DTYPES[config["compute_dtype"]][1], mesh)
    evaluator = Evaluator(graphdef, *shared)

    state = checkpointing.restore_newest(workdir, state, config, mesh)
    first_step = int(state.step)
    stops = np.flatnonzero(np.diff(learning_rates > 0)) + 1  # another kind of step comes next
    per_call = feeding.steps_per_call(config, (first_step, num_steps, *stops.tolist()), mesh)
    images = data.resident("train") if per_call > 1 else None
    train_step, statistics_step = make_train_step(
        graphdef, optimizer, *shared, several=images is not None
    )
    with (
        preemption.stop_at_a_step(mesh) as is_time_to_stop,
        checkpointing.open_manager(workdir, config["keep_checkpoints"]) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        if first_step >= num_steps:
            logging.info("Nothing to train: %s is at step %d already", workdir, first_step)
            return state
        logging.info(
            "%s at step %d of %d: %d parameters (%d of them the quantizer's), %d device(s), "
            "%d step(s) a call",
            *("Resuming" if first_step else "Starting", first_step, num_steps),
            train_state.num_parameters((state.params, state.statistics)),
            train_state.num_quantizer_parameters(state),
            mesh.size,
            1 if images is None else per_call,
        )
        writer = stack.enter_context(contextlib.closing(make_writer()))
        writer.write_hparams(
            {
                name: value if isinstance(value, int | float | str) else str(value)
                for name, value in configuration.flatten(config).items()
            }
        )
        writer.write_texts(
            first_step,
            {"config": configuration.to_markdown(config), "machine": sharding.describe(mesh)},
        )

        last_checkpoint = functools.partial(checkpointing.describe_newest, checkpoints)

        def validate(step: int) -> dict[str, float] | None:
            """Mean metrics; None if it had to stop."""
            logging.info("Validating at step %d", step)
            usage = CodebookUsage()
            means = evaluator.measure(
                state, data, "validation", batch_size, progress, usage, is_time_to_stop
            )
            if means is None:
                return None
            usage = usage.over_all_hosts()
            picture, histograms = evaluator.preview(state, data, "validation")
            scalars = {
                **means,
                "perplexity": usage.perplexity,
                "distinct_codes": usage.num_distinct,
            }
            writer.write_scalars(step, _prefixed("validation", scalars))
            writer.write_images(step, {"validation/reconstructions": picture[None]})
            writer.write_histograms(step, _prefixed("quantizer", histograms))
            return means

        # Preemption does not wait for a validation that is due: it is made up for.
        is_due = first_step > 0 and first_step % config["eval_every_steps"] == 0
        if is_due and checkpoints.metrics(first_step) is None and validate(first_step) is None:
            raise preemption.Preempted(_STOPPED.format(first_step))
        window, throughput = _MetricsWindow(last_checkpoint), _Throughput(batch_size)
        report = progress(num_steps)
        index_batches = order.training_batches(
            num_images,
            batch_size,
            seed=config["seed"],
            first_step=first_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        what = index_batches, first_step, num_steps, mesh
        calls = (
            feeding.one_by_one(data, *what)
            if images is None
            else feeding.several(images, *what, per_call)
        )
        previous_step = first_step
        for step, inputs, last_images in calls:
            learning_rate = learning_rates[step - 1]
            run = train_step if learning_rate > 0 else statistics_step
            called = time.monotonic()
            with StepTraceAnnotation("train", step_num=step):
                state, metrics = run(state, *inputs)
            if previous_step == first_step:
                compiled = time.monotonic()
                jax.block_until_ready(metrics)
                seconds = {
                    "compile_seconds": compiled - called,
                    "seconds_to_first_step": time.monotonic() - started,
                }
                writer.write_scalars(step, _prefixed("start", seconds))
            window.add(step, metrics)
            throughput.count_steps(step - previous_step)
            previous_step = step
            report(step)

            is_stopping = is_time_to_stop()
            is_log, is_evaluation, is_checkpoint = (
                step % config[interval] == 0 or step == num_steps
                for interval in configuration.INTERVALS
            )
            if not (is_log or is_evaluation or is_checkpoint or is_stopping):
                continue
            window.read()  # nothing that diverged is logged or saved
            rates = throughput.read()
            # The last update may have ruined the state.
            with TraceAnnotation("measure_batch"):
                loss, usage = evaluator.measure_batch(state, last_images())
            if not np.isfinite(loss):
                raise DivergenceError(
                    f"the loss is {loss} after step {step}: stopped; {last_checkpoint()}"
                )
            if is_log:
                scalars = {
                    **window.means(),
                    "perplexity": usage.perplexity,
                    "distinct_codes": usage.num_distinct,
                    "learning_rate": float(learning_rate),
                    **rates,
                }
                writer.write_scalars(step, _prefixed("train", scalars))
            validation = None
            if is_evaluation and not is_stopping:
                validation = validate(step)
                is_stopping = validation is None
            if is_checkpoint or is_stopping:
                with TraceAnnotation("save"):
                    checkpointing.save(
                        *(checkpoints, step, state, config, validation),
                        stop_on_failure=config["stop_on_failed_save"],
                        is_last=is_stopping or step == num_steps,
                    )
            if is_stopping:
                raise preemption.Preempted(_STOPPED.format(step))
            throughput.restart()
    return state


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
