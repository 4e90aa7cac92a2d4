"""Trains or evaluates a VQ-VAE, or encodes a data set with it.

    python main.py --config=configs/fashion_mnist.py:vq --workdir=runs/vq
    python main.py --workdir=runs/vq --mode=evaluate
    python main.py --workdir=runs/vq --mode=encode

The config argument names the quantizer; any field can be overridden, as in
--config.num_train_steps=200. The same command, given again, resumes the run where it stopped. A
checkpoint knows its model and its data set, so evaluation and encoding need no --config; with one,
they take its section `dataset` and, in evaluation, its batch size. On the hosts of a Cloud TPU pod
and under Slurm, the same command on each host makes one run.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

# TensorFlow: no log lines of its own, no search for a cloud's metadata server.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("NO_GCE_CHECK", "true")

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import input_pipeline
from llvq import checkpointing, errors
from llvq.config import TrainConfig, build, parse
from llvq.encode import encode
from llvq.errors import UserError, first_line
from llvq.evaluate import evaluate
from llvq.runtime import console, distributed, host_memory, preemption
from llvq.runtime.background import BackgroundWriter
from llvq.train import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. …:vq.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where checkpoints, metrics and results go.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "encode"], "What to do.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "What to evaluate or encode with, if not the workdir's newest checkpoint."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", "", "host:port of the first process, if there are several."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")

_PRINTED_RESULTS = (
    "split",
    "reconstruction_loss",
    "psnr",
    "ssim",
    "effective_codebook_size",
    "perplexity",
    "plug_in_entropy_bits_per_vector",
    "coded_bits_per_vector",
)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses and checks the flags; a mistake in them ends the program with one line."""
    with errors.one_line_exit("main.py"):
        try:
            arguments = flags.FLAGS(argv)
            config = _CONFIG.value
            if hasattr(config, "to_dict"):
                config.to_dict()  # raises what loading the config file has raised
        except UserError:
            raise
        except Exception as error:  # overrides of fields raise many kinds
            if _is_in_a_config_file(error):
                raise  # a program's error keeps its traceback
            raise UserError(_describe_mistake(error)) from error
        if len(arguments) > 1:
            raise UserError(f"unexpected argument {arguments[1]!r}: options start with --")
        is_training = _MODE.value == "train"
        if not _WORKDIR.value:
            raise UserError("--workdir is missing (see python main.py --help)")
        if config is None and is_training:
            raise UserError("--config is missing (see python main.py --help)")
        if _CHECKPOINT.value and is_training:
            raise UserError("--checkpoint is for --mode=evaluate and --mode=encode only")
        if config is not None:
            if build(config).compute_dtype == "float64":
                jax.config.update("jax_enable_x64", True)
            parse(config)
        return arguments


def _is_in_a_config_file(error: BaseException | None) -> bool:
    """Whether code of a config file raised the error, or what config_flags made it of."""
    if error is None:
        return False
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    is_here = any(name == "config_config" or name.startswith("configs.") for name in names)
    return is_here or _is_in_a_config_file(error.__cause__ or error.__context__)


def _describe_mistake(error: Exception) -> str:
    """Says what is wrong with the flags."""
    if isinstance(error, AttributeError):  # of an override of a field that the config lacks
        field = re.findall(r"'(\w+)'", str(error))
        return f"the config has no field {field[0] if field else error}: llvq/config.py lists them"
    if isinstance(error, OSError):
        files = sorted(path.stem for path in pathlib.Path("configs").glob("[a-z]*.py"))
        names = (f"configs/{name}.py" for name in files if name != "default")
        return f"--config: {error.__cause__ or error}: there are {', '.join(names)}"
    if isinstance(error, SyntaxError):
        return f"--config: {error.filename}, line {error.lineno}: {error.msg}"
    return " ".join(str(error).split())


def _keep_compiled_programs() -> None:
    """Caches them in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR is set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        with contextlib.suppress(RuntimeError, OSError):  # no home, or a home that is read-only
            directory = cache.expanduser() / "llvq"
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
            # By default JAX keeps only programs that took a second; many smaller ones make a model.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class _Writer(BackgroundWriter):
    """Writes the main scalars to the console, and everything to TensorBoard in the background."""

    def __init__(self) -> None:
        super().__init__(_make_tensorboard_writer)
        self._console = console.ConsoleWriter()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._console.write_scalars(step, scalars)
        super().write_scalars(step, scalars)


def _make_tensorboard_writer() -> Any:
    from clu import metric_writers

    import input_pipeline.host_tensorflow  # noqa: F401  clu imports TensorFlow

    return metric_writers.SummaryWriter(_WORKDIR.value)


def _make_writer() -> Any:
    """The writer of the first process has TensorBoard's files; the others only log."""
    return _Writer() if jax.process_index() == 0 else console.ConsoleWriter()


def main(argv: Sequence[str]) -> None:
    """Does what the flags say. A user's mistake ends it with one line."""
    del argv
    preemption.stop_at_once()
    console.set_up()
    _keep_compiled_programs()
    host_memory.keep_freed_memory()
    try:
        distributed.initialize(_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if jax.process_index() > 0:  # the first process speaks for all
            logging.set_verbosity(logging.WARNING)
        _run()
    except UserError as error:
        distributed.leave(str(error))
    except preemption.Preempted as stop:
        distributed.leave(stop.message, preemption.EXIT_CODE, together=True)
    except KeyboardInterrupt:
        distributed.leave("interrupted; the same command resumes from the last checkpoint")
    except Exception as error:
        if not distributed.is_loss(error):
            raise
        distributed.leave(f"{distributed.LOST} ({first_line(error)})")


def _run() -> None:
    workdir, checkpoint = _WORKDIR.value, _CHECKPOINT.value or None
    config = None if _CONFIG.value is None else parse(_CONFIG.value)
    if _MODE.value == "train":
        assert config is not None
        checkpointing.require_writable(workdir)  # before data is looked for
        with errors.naming_lack_of_memory():
            train_and_evaluate(config, workdir, _load_data(config), make_writer=_make_writer)
        return
    of_model = checkpointing.config_of(checkpoint or workdir)
    if of_model.compute_dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    checkpointing.require_writable(workdir)
    data = _load_data(_on_this_machine(of_model, config))
    dataset = None if config is None else config.dataset
    with errors.naming_lack_of_memory():
        if _MODE.value == "encode":
            from input_pipeline.tokens import TokenWriter  # imports TFDS

            encode(workdir, data, TokenWriter, checkpoint=checkpoint, dataset=dataset)
            return
        results = evaluate(
            workdir,
            data,
            checkpoint=checkpoint,
            batch_size=None if config is None else config.batch_size,
            dataset=dataset,
        )
    printed = {name: results[name] for name in _PRINTED_RESULTS}
    rows = [(k, f"{v:.5g}" if isinstance(v, float) else v) for k, v in printed.items()]
    table = console.markdown_table(("metric", "value"), rows, aligned=True)
    logging.info("%s has all results, among them\n%s", f"{workdir}/evaluation.json", table)


def _load_data(config: TrainConfig) -> Any:
    with distributed.first_process_first():
        return input_pipeline.load(**vars(config.dataset), image_shape=config.model.image_shape)


def _on_this_machine(of_model: TrainConfig, config: TrainConfig | None) -> TrainConfig:
    """A checkpoint's config, with the place of its data from the one of the command line."""
    if config is None:
        return of_model
    image_shape = of_model.model.image_shape
    if not all(image_shape):  # an imported model takes any size
        image_shape = config.model.image_shape
    model = dataclasses.replace(of_model.model, image_shape=image_shape)
    return dataclasses.replace(of_model, dataset=config.dataset, model=model)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
