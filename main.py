"""Trains or evaluates LL-VQ-VAE.

    python main.py --config=configs/fashion_mnist.py:vq --workdir=runs/vq
    python main.py --config=configs/fashion_mnist.py:vq --workdir=runs/vq --mode=evaluate

The config argument names the quantizer; any field can be overridden, as in
--config.num_train_steps=200. Run the same command again and it goes on where it stopped. On the
hosts of a Cloud TPU pod and under Slurm the same command on each host makes one run.
"""

import contextlib
import json
import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

# For TensorFlow: no notes of its own in the console, no search for a cloud server.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("NO_GCE_CHECK", "true")

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from llvq import checkpointing, errors
from llvq import config as configuration
from llvq.errors import UserError, first_line
from llvq.evaluate import evaluate
from llvq.runtime import console, distributed, host_memory, preemption
from llvq.train import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. …:vq.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where checkpoints, metrics and results go.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "What to evaluate, if not the newest checkpoint of the workdir."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", "", "host:port of the first process, if there are several."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")

_PROGRESS_SECONDS = 10.0


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a mistake in them ends in one line, without a traceback."""
    try:
        arguments = _read_flags(argv)
        config = _CONFIG.value
        if config.get("compute_dtype") == "float64":
            jax.config.update("jax_enable_x64", True)
        configuration.validate(config)
        return arguments
    except UserError as error:
        sys.exit(f"main.py: {error}")


def _read_flags(argv: Sequence[str]) -> list[str]:
    """Raises UserError, whatever absl, ml_collections or a config file raise over the flags."""
    try:
        arguments = flags.FLAGS(argv)
        config = _CONFIG.value
        if config:
            config.to_dict()  # a config file that could not be loaded raises here
    except UserError:
        raise
    except AttributeError as error:
        field = str(error).strip("\"'")
        raise UserError(
            f"the config has no field {field!r}: configs/default.py lists them"
        ) from error
    except flags.Error as error:
        raise UserError(_cause(error)) from error
    except OSError as error:
        raise UserError(f"--config: {_cause(error.__cause__ or error)}") from error
    except Exception as error:
        raise UserError(f"in --config or an override of its fields: {_cause(error)}") from error
    if len(arguments) > 1:
        raise UserError(f"unexpected argument {arguments[1]!r}: options start with --")
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing (see python main.py --help)")
    if _CHECKPOINT.value and _MODE.value != "evaluate":
        raise UserError("--checkpoint is for --mode=evaluate only")
    return arguments


def _cause(error: BaseException) -> str:
    """In one line; a mistake inside a config file comes with its traceback, the cause behind it."""
    text = str(error).strip() or type(error).__name__
    cause = text.splitlines()[-1] if "Traceback" in text else text
    return f"{' '.join(cause.split()):.300}"


def _set_up_console() -> None:
    """Short lines, and of the libraries' own messages only warnings."""
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def concerns_user(record: python_logging.LogRecord) -> bool:
        if record.name == "asyncio" or ("/orbax/" in record.pathname and record.exc_info):
            return False  # tracebacks of what Orbax raises as well, and we say in one line
        if "site-packages" not in record.pathname or "/clu/" in record.pathname:
            return True
        is_tensorflow = "/tensorflow" in record.pathname  # it warns of much that is as it should be
        return record.levelno >= (python_logging.ERROR if is_tensorflow else python_logging.WARNING)

    handler.addFilter(concerns_user)

    # TensorStore's threads call this when a read or write fails and Orbax waits for others no more.
    def show_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show_exception
    logging.set_verbosity(logging.INFO)


def _keep_compiled_programs() -> None:
    """In the user's cache, for the next run, unless JAX_COMPILATION_CACHE_DIR names a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        with contextlib.suppress(RuntimeError, OSError):  # no home, or none to write to
            directory = cache.expanduser() / "llvq"
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(directory))


def _make_writer() -> Any:
    """Scalars to the console, everything to TensorBoard; only the first process writes."""
    from clu import metric_writers

    writers: list[Any] = [console.ConsoleWriter()]
    if jax.process_index() == 0:
        writers.append(metric_writers.SummaryWriter(_WORKDIR.value))
    return metric_writers.AsyncMultiWriter(writers)


def _make_progress(num_steps: int) -> Callable[[int], Any]:
    from clu import periodic_actions

    return periodic_actions.ReportProgress(num_train_steps=num_steps, every_secs=_PROGRESS_SECONDS)


def main(argv: Sequence[str]) -> None:
    """Does what the flags say; a user's mistake, or a lost process, ends in one line."""
    del argv
    preemption.stop_at_once()
    _set_up_console()
    _keep_compiled_programs()
    host_memory.keep_freed_memory()
    try:
        distributed.initialize(_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if jax.process_index() > 0:  # the first process tells what all of them do
            logging.set_verbosity(logging.WARNING)
        _run()
    except UserError as error:
        distributed.leave(str(error))
    except preemption.Preempted as stop:
        distributed.leave(stop.message, preemption.EXIT_CODE, together=True)
    except KeyboardInterrupt:
        distributed.leave("interrupted; the same command goes on from the last checkpoint")
    except Exception as error:
        if not distributed.is_loss(error):
            raise
        distributed.leave(f"{distributed.LOST} ({first_line(error)})")


def _run() -> None:
    # TensorFlow takes seconds to import: not before the flags are known to be good.
    import tensorflow as tf
    from clu import asynclib

    import input_pipeline

    tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's
    tf.config.set_visible_devices([], "TPU")
    config, workdir = _CONFIG.value, _WORKDIR.value
    try:
        checkpointing.require_writable(workdir)
        if _MODE.value == "evaluate":  # before data is looked for
            checkpointing.find(_CHECKPOINT.value or workdir)
        with distributed.first_process_first():
            data = input_pipeline.load(**config.dataset)
        with errors.naming_lack_of_memory():
            if _MODE.value == "train":
                train_and_evaluate(
                    config, workdir, data, make_writer=_make_writer, progress=_make_progress
                )
            else:
                results = evaluate(
                    config,
                    workdir,
                    data,
                    checkpoint=_CHECKPOINT.value or None,
                    progress=_make_progress,
                )
                logging.info("%s", json.dumps(results, indent=2))
    except asynclib.AsyncError as error:
        # Of TensorBoard's files; the cause is what TensorFlow raised.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause).rpartition("}} ")[2]
        raise UserError(
            f"metrics cannot be written ({reason}): the same command goes on from the last "
            "checkpoint"
        ) from error


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
