"""Checkpoints of a run, in WORKDIR/checkpoints, and checkpoints to evaluate.

A checkpoint is a directory with three items: `state`, the pytree of the train state; `config`, the
run's config as JSON; and `digests`, hashes of both, since TensorStore checks its index but not the
arrays. Kept are the newest few and the two best by validation `reconstruction_loss` (not by total
loss, which for a lattice holds −γ·Σ|b|).

A checkpoint that turns out to be damaged is passed over, with a warning: a run is resumed from, and
evaluated at, its newest checkpoint that is sound.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax import checkpoint as ocp

from llvq.config import Config, check_resumable, check_saved, to_plain
from llvq.errors import UserError, first_line
from llvq.models.vqvae import VQVAE
from llvq.runtime import sharding
from llvq.training import train_state
from llvq.training.train_state import TrainState, Tree

_NUM_BEST = 2
_NUM_BYTES_OF_METADATA = 2**18  # more than Orbax writes besides the arrays

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
    if jax.process_count() > 1:
        _require_shared(directory)


def _require_shared(directory: epath.Path) -> None:
    """Raises UserError unless all processes see the same directory."""
    probe = directory / ".shared"
    if jax.process_index() == 0:
        probe.write_text("")
    multihost_utils.sync_global_devices("the workdir's probe is written")
    is_shared = probe.exists()
    multihost_utils.sync_global_devices("the workdir's probe is looked for")
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)
    if not is_shared:
        raise UserError(
            f"--workdir={directory} is not the same directory for all processes: name one that "
            "they share, or gs://…"
        )


def _rank(metrics: Mapping[str, float]) -> float:
    return metrics["reconstruction_loss"]


@contextlib.contextmanager
def open_manager(workdir: epath.PathLike, keep_checkpoints: int) -> Iterator[ocp.CheckpointManager]:
    """The manager of a run's checkpoints, saving in the background.

    Raises:
      UserError: on leaving, if the last save failed.
    """
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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} is no directory ({error.strerror}): move it away") from error
    manager = ocp.CheckpointManager(
        directory,
        item_names=("state", "config", "digests"),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Without best_fn Orbax does not write metrics, and a resumed run forgets the best.
            best_fn=_rank,
            best_mode="min",
            cleanup_tmp_directories=True,
        ),
    )
    with contextlib.closing(manager):
        try:
            yield manager
        except BaseException:
            _wait(manager, stop_on_failure=False)
            raise
        _wait(manager)


@contextlib.contextmanager
def _saving(
    manager: ocp.CheckpointManager, step: int | None, stop_on_failure: bool
) -> Iterator[None]:
    """Makes one line of a save that fails, an error or a warning, and removes what it leaves."""
    try:
        yield
    except Exception as error:
        if jax.process_index() == 0:
            _remove_leftovers(manager.directory / str(step))
        manager.reload()  # Orbax no longer counts what this checkpoint was to supersede
        message = f"the checkpoint of step {step} could not be saved ({first_line(error)})"
        # Of several processes, one alone cannot go on.
        if stop_on_failure or jax.process_count() > 1:
            raise UserError(f"{message}: stopped; {describe_newest(manager)}") from error
        logging.warning("%s: going on without; %s", message, describe_newest(manager))


def _wait(manager: ocp.CheckpointManager, *, stop_on_failure: bool = True) -> None:
    """Waits for the save under way."""
    with _saving(manager, manager.latest_step(), stop_on_failure):
        manager.wait_until_finished()


def describe_newest(manager: ocp.CheckpointManager) -> str:
    """Says what a run that stops here would go on from."""
    _wait(manager, stop_on_failure=False)
    newest = manager.latest_step()
    if newest is None:
        return "no checkpoint was saved before it"
    return f"the last good checkpoint is {manager.directory / str(newest)}"


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    config: Config,
    metrics: dict[str, float] | None,
    *,
    stop_on_failure: bool = True,
    is_last: bool = False,
) -> None:
    """Starts saving, once the save before it is done.

    Args:
      manager: of the run's checkpoints.
      step: the state's.
      state: what is saved.
      config: the run's.
      metrics: of validation, if there are any at this step; they rank the checkpoint.
      stop_on_failure: whether a save that fails is an error, or only a warning.
      is_last: whether the run ends here: it waits, and a save that fails is an error in any case.

    Raises:
      UserError: if this save, or the one before it in the background, fails.
    """
    config = to_plain(config)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(config),
        digests=ocp.args.JsonSave(_digests(vars(state), config, metrics)),
    )
    _wait(manager, stop_on_failure=stop_on_failure)
    with _saving(manager, step, stop_on_failure or is_last):
        _require_room(manager.directory, _num_bytes(state))
        manager.save(step, args=items, metrics=metrics)
    if is_last:
        _wait(manager)


class _DamageError(Exception):
    """Why a checkpoint cannot be read."""


def _digests(state: Tree, config: Any, metrics: Any) -> dict[str, str]:
    """A hash of each part of a checkpoint, independent of how it is stored and sharded."""

    def of_json(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def of_arrays(tree: Any) -> str:
        digest = hashlib.sha256()
        for array in map(np.asarray, jax.tree.leaves(tree)):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    return {
        "config": of_json(config),
        "metrics": of_json(metrics),
        **{name: of_arrays(tree) for name, tree in state.items()},
    }


def _read(checkpoint: epath.Path, make_like: Callable[[Config], Tree]) -> tuple[Config, Tree]:
    """A checkpoint's config and state, compared with its digests.

    By Orbax's handlers themselves, which do not wait for other processes as its manager does.

    Args:
      checkpoint: the directory.
      make_like: makes of the config the structure, shapes and dtypes of the part of the state that
        is wanted; a UserError that it raises is passed on.

    Returns:
      The config, and the part of the state in NumPy arrays.

    Raises:
      _DamageError: if anything is missing or cannot be read, or is not what was saved.
    """
    try:
        reader = ocp.JsonCheckpointHandler()
        config = reader.restore(checkpoint / "config")
        metrics = None
        if (checkpoint / "metrics").exists():
            metrics = ocp.JsonCheckpointHandler("metrics").restore(checkpoint / "metrics")
            _rank(metrics)
        digests = None
        if (checkpoint / "digests").exists():  # the first versions wrote none
            digests = reader.restore(checkpoint / "digests")

        def check(state: Tree) -> None:
            for part, digest in _digests(state, config, metrics).items():
                if digests is not None and digests[part] != digest:
                    raise ValueError(f"its {part} is not what was saved")

        check({})
        like = make_like(config)
        state = ocp.PyTreeCheckpointHandler().restore(
            checkpoint / "state",
            args=ocp.args.PyTreeRestore(
                like,
                # In the dtype that was saved.
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like),
                partial_restore=True,
            ),
        )
        check(state)

        def convert(array: np.ndarray, wanted: Any) -> np.ndarray:
            if array.shape != wanted.shape:
                raise ValueError(f"an array has the shape {array.shape}, not {wanted.shape}")
            return array.astype(wanted.dtype)

        return config, jax.tree.map(convert, state, like)
    except UserError:
        raise
    except Exception as error:
        raise _DamageError(first_line(error)) from error


_NOTHING_THERE, _NONE_SOUND, _UNNUMBERED = -1, -2, -3


def _read_newest(
    directory: epath.Path,
    checkpoints: Sequence[epath.Path],
    read: Callable[[epath.Path], Any],
    remedy: str,
) -> tuple[epath.Path, Any, dict[epath.Path, _DamageError]] | None:
    """Reads the first checkpoint that is sound; of several processes, process 0 decides which.

    Args:
      directory: where the checkpoints are.
      checkpoints: in it; what other processes than process 0 find there does not matter, unless it
        is the only one, by a name of its own.
      read: raises _DamageError.
      remedy: for a run without a sound checkpoint.

    Returns:
      The checkpoint, what was read of it, and, on process 0, why those before it could not be; None
      if there are no checkpoints.

    Raises:
      UserError: if none is sound; or what `read` raises.
    """
    damage: dict[epath.Path, _DamageError] = {}
    step = _NONE_SOUND if checkpoints else _NOTHING_THERE
    if jax.process_index() == 0:
        for checkpoint in checkpoints:
            try:
                read(checkpoint)
            except _DamageError as error:
                damage[checkpoint] = error
                continue
            except UserError:
                pass  # which every process gets below
            step = int(checkpoint.name) if checkpoint.name.isdecimal() else _UNNUMBERED
            break
    step = _of_first_process(step)
    if step == _NOTHING_THERE:
        return None
    reason: Any = next(iter(damage.values()), "see what process 0 says")
    if step != _NONE_SOUND:
        checkpoint = checkpoints[0] if step == _UNNUMBERED else directory / str(step)
        try:
            return checkpoint, read(checkpoint), damage
        except _DamageError as error:
            reason = error
    newest = checkpoints[0] if checkpoints else directory
    others = f", nor can the {len(checkpoints) - 1} before it" if len(checkpoints) > 1 else ""
    raise UserError(f"checkpoint {newest} cannot be read ({reason}){others}: {remedy}")


def _of_first_process(number: int) -> int:
    """What process 0 passes, for all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def restore_newest(
    workdir: epath.PathLike, state: TrainState, config: Config, mesh: Mesh
) -> TrainState:
    """The state from which a run goes on: of its newest checkpoint that is sound.

    Damaged ones, which would be in the way when their steps are saved again, are renamed to
    STEP.damaged, with a warning. Call it before the manager is opened, in all processes.

    Args:
      workdir: of the run.
      state: what the run starts from if there is no checkpoint.
      config: the run's.
      mesh: the devices.

    Returns:
      A state of the structure of `state`, replicated over the mesh.

    Raises:
      UserError: if the workdir holds another run, or no checkpoint of it is sound.
    """
    directory = absolute(workdir) / "checkpoints"
    checkpoints = _finished(directory)

    def like(saved: Config) -> Tree:
        check_resumable(config, saved, os.fspath(directory.parent))
        return vars(state)

    found = _read_newest(
        directory,
        checkpoints,
        lambda checkpoint: _read(checkpoint, like),
        "delete what is damaged to start anew, or use another --workdir",
    )
    if found is None:
        return state
    newest, (_, tree), damage = found
    if jax.process_index() == 0:
        # The manager ranks by the metrics of older ones, too.
        for checkpoint in checkpoints[checkpoints.index(newest) + 1 :]:
            try:
                _read(checkpoint, lambda _: {"step": state.step})
            except _DamageError as error:
                damage[checkpoint] = error
        for checkpoint, reason in damage.items():
            names = (f"{checkpoint.name}.damaged{suffix}" for suffix in ("", *range(2, 1000)))
            aside = next(path for path in map(directory.joinpath, names) if not path.exists())
            checkpoint.rename(aside)
            logging.warning(
                "Checkpoint %s cannot be read (%s): going on from %s, and it is now %s",
                *(checkpoint, reason, newest, aside),
            )
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
    return jax.device_put(TrainState(**tree), sharding.replicated(mesh))


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
        _require_room(target.parent, _num_bytes(arrays))
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(),
            config=ocp.JsonCheckpointHandler(),
            digests=ocp.JsonCheckpointHandler(),
        )
        config = to_plain(config)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            config=ocp.args.JsonSave(config),
            digests=ocp.args.JsonSave(_digests(arrays, config, metrics=None)),
        )
        with _removing_leftovers(target), ocp.Checkpointer(handler) as writer:
            writer.save(target, args=items)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{target} cannot be written ({first_line(error)})") from error


def _require_room(directory: epath.Path, num_bytes: int) -> None:
    """Raises OSError on a full disk, over which Orbax would print pages of tracebacks."""
    if "://" in os.fspath(directory) or jax.process_index() != 0:  # buckets are never full
        return
    probe = directory / ".room-for-checkpoint"
    try:
        probe.write_bytes(bytes(num_bytes + _NUM_BYTES_OF_METADATA))
    finally:
        probe.unlink(missing_ok=True)


def _num_bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _remove(directory: epath.Path) -> None:
    """Deletes what a save that failed has written, as far as it can be."""
    with contextlib.suppress(OSError):  # it may be gone, or still be written to
        directory.rmtree()


def _remove_leftovers(checkpoint: epath.Path) -> None:
    """Deletes what a save that failed has written under a temporary name."""
    for leftover in checkpoint.parent.glob(f"{checkpoint.name}.orbax-checkpoint-tmp*"):
        _remove(leftover)


@contextlib.contextmanager
def _removing_leftovers(target: epath.Path) -> Iterator[None]:
    """Deletes what an interrupted or failed save leaves of a new directory."""
    try:
        yield
    except BaseException:
        _remove(target)
        _remove_leftovers(target)
        raise


def _finished(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints in a directory, newest first, but for what is still being written."""
    steps = [
        int(child.name)
        for child in (directory.iterdir() if directory.is_dir() else ())
        # On a bucket what is being written has its final name already.
        if child.name.isdecimal() and ocp.utils.is_checkpoint_finalized(child)
    ]
    return [directory / str(step) for step in sorted(steps, reverse=True)]


def saved_batch_size(workdir: epath.PathLike) -> int | None:
    """The batch size of the run in a workdir, if it has a checkpoint; the same on all processes."""
    batch_size = 0
    for checkpoint in _finished(absolute(workdir) / "checkpoints"):
        with contextlib.suppress(_DamageError):
            config, _ = _read(checkpoint, lambda _: {"step": np.zeros((), np.int32)})
            batch_size = config["batch_size"]
            break
    return _of_first_process(batch_size) or None


def _candidates(path: epath.PathLike) -> list[epath.Path]:
    """The checkpoints that a path may mean: itself, or those of a run, newest first."""
    root = absolute(path)
    if (root / "state").exists() and (root / "config").exists():
        return [root]
    if root.exists() and not root.is_dir():
        raise UserError(
            f"{root} is a file, but a checkpoint is a directory: python -m llvq.import_torch makes "
            f"one of an LL-VQ-VAE in PyTorch"
        )
    directory = root / "checkpoints" if (root / "checkpoints").exists() else root
    checkpoints = _finished(directory)
    if not checkpoints:
        raise UserError(f"no checkpoint in {root}: train first, or name one with --checkpoint")
    return checkpoints


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint that a path means, by its name alone; see `load_newest` for its contents.

    Args:
      path: a checkpoint, a directory of checkpoints, or a workdir, of which it is the newest one.

    Raises:
      UserError: if there is no checkpoint.
    """
    return _candidates(path)[0]


def load_newest(path: epath.PathLike) -> tuple[epath.Path, Config, TrainState]:
    """A checkpoint, its config and, of its state, what inference needs; opt_state is left empty.

    The config is the whole one of a run of this project, or what an imported model's file told.

    Args:
      path: a checkpoint; or a directory of checkpoints or a workdir, of which the newest one is
        taken that is sound, with a warning if others are newer. All processes must ask then.

    Raises:
      UserError: if there is no checkpoint, or it, or every one of the run, is damaged.
    """

    def like(config: Config) -> Tree:
        try:
            check_saved(config)
            _, params, statistics = _abstract_model(config)
        except UserError as error:  # what was saved was a possible model
            raise ValueError(str(error)) from error
        return {"step": np.zeros((), np.int32), "params": params, "statistics": statistics}

    candidates = _candidates(path)
    found = _read_newest(
        candidates[0].parent,
        candidates,
        lambda checkpoint: _read(checkpoint, like),
        "name another one with --checkpoint",
    )
    assert found is not None
    checkpoint, (config, state), damage = found
    for damaged, error in damage.items():
        logging.warning("Checkpoint %s cannot be read (%s): taking %s", damaged, error, checkpoint)
    state = jax.device_put(state, jax.local_devices()[0])
    return checkpoint, config, TrainState(**state, opt_state=())


def load(path: epath.PathLike) -> tuple[Config, TrainState]:
    """The config and state of a checkpoint: `load_newest`, for whom its name does not matter."""
    _, config, state = load_newest(path)
    return config, state


def _abstract_model(config: Config) -> tuple[nnx.GraphDef[VQVAE], Tree, Tree]:
    return train_state.abstract_model(config["model"], config["quantizer"], config["compute_dtype"])


def model_of(config: Config, state: TrainState) -> VQVAE:
    """The model that a checkpoint holds, as `load` returned it."""
    graphdef, _, _ = _abstract_model(config)
    return nnx.merge(graphdef, state.params, state.statistics)
