"""Saving: the checkpoints of a run, in WORKDIR/checkpoints, and checkpoints for inference.

A checkpoint is a directory with three items: `state`, the pytree of the train state; `config`, the
run's config as JSON; and `digests`, hashes of both. The newest few are kept, and the two best by
validation.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from orbax import checkpoint as ocp

from llvq.checkpointing.integrity import digests, remove, remove_leftovers, require_room
from llvq.checkpointing.reading import FORMAT, absolute
from llvq.errors import UserError, first_line
from llvq.training.train_state import TrainState, parts

_NUM_BEST = 2

_preservation = ocp.checkpoint_managers


@contextlib.contextmanager
def open_manager(
    workdir: epath.PathLike, keep_checkpoints: int, ranking: str
) -> Iterator[ocp.CheckpointManager]:
    """Opens the manager of a run's checkpoints, which saves in the background.

    Args:
      workdir: of the run.
      keep_checkpoints: how many of the newest to keep.
      ranking: the name of the figure of validation that ranks checkpoints; lower is better.

    Raises:
      UserError: on leaving, if the last save failed.
    """
    directory = absolute(workdir) / "checkpoints"

    def rank(metrics: Mapping[str, float]) -> float:
        return metrics[ranking]

    policy = _preservation.AnyPreservationPolicy(
        [
            _preservation.LatestN(keep_checkpoints),
            _preservation.BestN(
                get_metric_fn=rank,
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
            best_fn=rank,
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
    """Turns a failed save into a one-line error or warning, and removes what it left."""
    try:
        yield
    except Exception as error:
        if jax.process_index() == 0:
            remove_leftovers(manager.directory / str(step))
        manager.reload()  # otherwise Orbax still counts the failed checkpoint as newest
        message = f"the checkpoint of step {step} could not be saved ({first_line(error)})"
        # One of several processes cannot continue alone.
        if stop_on_failure or jax.process_count() > 1:
            raise UserError(f"{message}: stopped; {describe_newest(manager)}") from error
        logging.warning("%s: going on without; %s", message, describe_newest(manager))


def _wait(manager: ocp.CheckpointManager, *, stop_on_failure: bool = True) -> None:
    """Waits for the save under way."""
    with _saving(manager, manager.latest_step(), stop_on_failure):
        manager.wait_until_finished()


def describe_newest(manager: ocp.CheckpointManager) -> str:
    """Says what a run that stops here would resume from."""
    _wait(manager, stop_on_failure=False)
    newest = manager.latest_step()
    if newest is None:
        return "no checkpoint was saved before it"
    return f"the last good checkpoint is {manager.directory / str(newest)}"


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    config: Mapping[str, Any],
    metrics: dict[str, float] | None,
    *,
    stop_on_failure: bool = True,
    is_last: bool = False,
) -> None:
    """Starts saving, once the save before it is done.

    Args:
      manager: of the run's checkpoints.
      step: the number of steps done.
      state: the train state after that step.
      config: of the run, as nested dicts.
      metrics: of validation, if there are any at this step; they rank the checkpoint.
      stop_on_failure: whether a save that fails is an error, or only a warning.
      is_last: whether the run ends here: it waits, and a save that fails is an error in any case.

    Raises:
      UserError: if this save, or the one before it in the background, fails.
    """
    kept = parts(state)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(kept),
        config=ocp.args.JsonSave(config),
        digests=ocp.args.JsonSave({"format": FORMAT, **digests(kept, config, metrics)}),
    )
    _wait(manager, stop_on_failure=stop_on_failure)
    with _saving(manager, step, stop_on_failure or is_last):
        require_room(manager.directory, state)
        manager.save(step, args=items, metrics=metrics)
    if is_last:
        _wait(manager)


def save_for_inference(
    directory: epath.PathLike, state: TrainState, config: Mapping[str, Any]
) -> None:
    """Writes a checkpoint for `load` in a new directory, without what only training needs.

    Args:
      directory: must not exist, or be empty.
      state: its `best_params` are kept, without what only training needs.
      config: a run's config, or the part of one that is known, as nested dicts; height and width
        of the images may be 0.

    Raises:
      UserError: if the directory holds something or cannot be written. Then nothing is.
    """
    target = absolute(directory)
    # NumPy arrays, because Orbax would save the sharding of arrays on devices.
    arrays = jax.tree.map(
        np.asarray,
        {"step": state.step, "params": state.best_params, "statistics": state.statistics},
    )
    arrays = {name: tree for name, tree in arrays.items() if jax.tree.leaves(tree)}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(arrays),
        config=ocp.args.JsonSave(config),
        digests=ocp.args.JsonSave({"format": FORMAT, **digests(arrays, config, metrics=None)}),
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
        digests=ocp.JsonCheckpointHandler(),
    )
    try:
        if target.exists():
            if not target.is_dir() or any(target.iterdir()):
                raise UserError(f"{target} exists already: name a new directory, or delete it")
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        require_room(target.parent, arrays)
        try:
            with ocp.Checkpointer(handler) as writer:
                writer.save(target, args=items)
        except BaseException:
            remove(target)
            raise
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{target} cannot be written ({first_line(error)})") from error
