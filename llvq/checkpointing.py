"""Checkpoints of a run, in WORKDIR/checkpoints, and checkpoints to evaluate.

A checkpoint is a directory with two items: `state`, the pytree of the train state, and `config`,
the run's config as JSON. Kept are the newest few and the two best by validation
`reconstruction_loss` (not by total loss, which for a lattice holds −γ·Σ|b|).
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from orbax import checkpoint as ocp

from llvq import sharding, train_state
from llvq.configuration import Config, check_resumable, check_saved, to_plain
from llvq.errors import UserError, first_line
from llvq.model import VQVAE
from llvq.train_state import TrainState, Tree

_NUM_BEST = 2

_preservation = ocp.checkpoint_managers


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as Orbax wants it, absolute; gs://… is so already."""
    return epath.Path(path if "://" in os.fspath(path) else pathlib.Path(path).absolute())


def require_writable(workdir: epath.PathLike) -> None:
    """Makes the workdir if need be; raises UserError unless files can be written to it."""
    directory = epath.Path(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={directory} cannot be written to: {error.strerror or error}"
        ) from error


def _rank(metrics: Mapping[str, float]) -> float:
    return metrics["reconstruction_loss"]


@contextlib.contextmanager
def _reading(checkpoint: epath.Path, remedy: str) -> Iterator[None]:
    """Makes one line of whatever Orbax, TensorStore or JSON raise over a damaged checkpoint."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be read ({first_line(error)}): {remedy}"
        ) from error


def open_manager(workdir: epath.PathLike, keep_checkpoints: int) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints, saving in the background; use it as a context."""
    directory = absolute(workdir) / "checkpoints"
    policy = _preservation.AnyPreservationPolicy(
        [
            _preservation.LatestN(keep_checkpoints),
            _preservation.BestN(
                get_metric_fn=_rank,
                reverse=True,  # ascending order keeps the highest
                n=_NUM_BEST,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    directory.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
        directory,
        item_names=("state", "config"),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Without best_fn Orbax does not write metrics, and a resumed run forgets the best.
            best_fn=_rank,
            best_mode="min",
            cleanup_tmp_directories=True,
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    config: Config,
    metrics: dict[str, float] | None,
) -> None:
    """Starts saving; validation metrics, if there are any at this step, rank the checkpoint."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(to_plain(config))
        ),
        metrics=metrics,
    )


def restore(
    manager: ocp.CheckpointManager, step: int, state: TrainState, config: Config, mesh: Mesh
) -> TrainState:
    """The state of a checkpoint, like `state` in structure, replicated over a mesh.

    Raises:
      UserError: if the checkpoint is another run's, or is damaged.
    """
    directory = manager.directory / str(step)
    remedy = "delete it to go on from the one before it, or use another --workdir"
    with _reading(directory, remedy):
        items = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    check_resumable(config, items["config"], os.fspath(manager.directory.parent))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), state
    )
    with _reading(directory, remedy):
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return manager.restore(step, args=args)["state"]


def save_for_inference(directory: epath.PathLike, state: TrainState, config: Config) -> None:
    """Writes a checkpoint for `load` in a new directory, without what only training needs.

    Args:
      directory: must not exist, or be empty.
      state: its opt_state is left out.
      config: as for a run, or the part of it that is known: `compute_dtype`, `quantizer`, and
        `model` but for value_range and, None in image_shape, height and width.

    Raises:
      UserError: if the directory holds something or cannot be written. Then nothing is.
    """
    target = absolute(directory)
    # NumPy arrays: of arrays on devices Orbax would save the sharding, too.
    arrays = jax.tree.map(
        np.asarray,
        {"step": state.step, "params": state.params, "statistics": state.statistics},
    )
    try:
        if target.exists():
            if not target.is_dir() or any(target.iterdir()):
                raise UserError(f"{target} exists already: name a new directory, or delete it")
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target.parent, sum(array.nbytes for array in jax.tree.leaves(arrays)))
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), config=ocp.JsonCheckpointHandler()
        )
        with _removing_leftovers(target), ocp.Checkpointer(handler) as writer:
            writer.save(
                target,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), config=ocp.args.JsonSave(to_plain(config))
                ),
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{target} cannot be written ({first_line(error)})") from error


def _require_room(directory: epath.Path, num_bytes: int) -> None:
    """Raises OSError on a full disk, over which Orbax would print pages of tracebacks."""
    probe = directory / ".room-for-checkpoint"
    try:
        probe.write_bytes(bytes(num_bytes))
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _removing_leftovers(target: epath.Path) -> Iterator[None]:
    """Deletes what an interrupted or failed save leaves of a new directory."""
    try:
        yield
    except BaseException:
        for leftover in (target, *target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*")):
            if leftover.exists():
                leftover.rmtree()
        raise


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint that a path means: itself, or the newest one of a run's directory.

    Args:
      path: a checkpoint, a directory of checkpoints, or a workdir.

    Raises:
      UserError: if there is no checkpoint.
    """
    root = absolute(path)
    if (root / "state").exists() and (root / "config").exists():
        return root
    if root.exists() and not root.is_dir():
        raise UserError(
            f"{root} is a file, but a checkpoint is a directory: python -m llvq.import_torch makes "
            f"one of an LL-VQ-VAE in PyTorch"
        )
    directory = root / "checkpoints" if (root / "checkpoints").exists() else root
    children = directory.iterdir() if directory.exists() else ()
    steps = [
        int(child.name)
        for child in children
        # On a bucket what is being written has its final name already.
        if child.name.isdecimal() and ocp.utils.is_checkpoint_finalized(child)
    ]
    if not steps:
        raise UserError(f"no checkpoint in {root}: train first, or name one with --checkpoint")
    return directory / str(max(steps))


def load(path: epath.PathLike) -> tuple[Config, TrainState]:
    """A checkpoint's config and, of its state, what inference needs; opt_state is left empty.

    The config is the whole one of a run of this project, or what an imported model's file told.

    Args:
      path: as for `find`.

    Raises:
      UserError: if there is no checkpoint or it cannot be read.
    """
    checkpoint = find(path)
    with _reading(checkpoint, "name another one with --checkpoint"):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            config: dict[str, Any] = reader.restore(checkpoint / "config")
        check_saved(config)
        _, params, statistics = _abstract_model(config)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            {"step": np.zeros((), np.int32), "params": params, "statistics": statistics},
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(
                checkpoint / "state",
                args=ocp.args.PyTreeRestore(
                    wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    return config, TrainState(**state, opt_state=())


def _abstract_model(config: Config) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    return train_state.abstract_model(config["model"], config["quantizer"], config["compute_dtype"])


def model_of(config: Config, state: TrainState) -> VQVAE:
    """The model that a checkpoint holds, as `load` returned it."""
    graphdef, _, _ = _abstract_model(config)
    return nnx.merge(graphdef, state.params, state.statistics)
