"""Which checkpoint is sound, and what it holds.

A checkpoint that turns out to be damaged is passed over, with a warning: a run resumes from, and is
evaluated at, its newest checkpoint that is sound.
"""

import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from orbax import checkpoint as ocp

from llvq.checkpointing.integrity import digests, require_writable
from llvq.checkpointing.saved_config import SavedConfig, from_saved
from llvq.config import DatasetConfig, TrainConfig
from llvq.data import Dataset
from llvq.data.dataset import check_data
from llvq.errors import DamageError, UserError, first_line
from llvq.models import VQVAE, factory
from llvq.models.factory import Tree
from llvq.training.train_state import TrainState, parts

# The format of the checkpoints that are written today, kept beside their digests. In format 2,
# opt_state is Adam's moments alone; in all others it is what optax has, where Adam's learning rate
# counts the steps once more.
FORMAT = 3


class Checkpoint(NamedTuple):
    """Attributes:
    path: the directory.
    config: of the run; an imported one has what its file tells, and defaults.
    state: in NumPy arrays; opt_state is () where it was not asked for.
    """

    path: epath.Path
    config: TrainConfig
    state: TrainState


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as Orbax wants it, absolute; gs://… is so already."""
    return epath.Path(path if "://" in os.fspath(path) else pathlib.Path(path).absolute())


def find(
    path: epath.PathLike, remedy: str = "train first, or name one with --checkpoint"
) -> epath.Path:
    """The checkpoint that a path means, by its name alone; see `load` for its contents.

    Args:
      path: a checkpoint, a directory of checkpoints, or a workdir; of several the newest is meant.
      remedy: what to do if there is none, for the message.

    Raises:
      UserError: if there is no checkpoint.
    """
    return _candidates(path, remedy)[0]


def load(path: epath.PathLike) -> Checkpoint:
    """A checkpoint with as much of its state as inference needs.

    Args:
      path: as for `find`. Of several, the newest one that is sound is taken, with a warning if
        others are newer. All processes must ask then.

    Raises:
      UserError: if there is no checkpoint, or none is sound.
    """

    def like(config: SavedConfig, saved: Collection[str]) -> Tree:
        architecture = from_saved(config).architecture
        _, params, statistics = factory.split(factory.abstract_model(architecture))
        of_params = "averages" if "averages" in saved else "params"
        return {"step": np.zeros((), np.int32), of_params: params, "statistics": statistics}

    candidates = _candidates(path, "train first")
    found = _newest_sound(candidates[0].parent, candidates, like, "name another one")
    assert found is not None
    checkpoint, (config, state), damage = found
    for damaged, error in damage.items():
        logging.warning("Checkpoint %s cannot be read (%s): taking %s", damaged, error, checkpoint)
    params, statistics = state.get("averages") or state["params"], state.get("statistics") or {}
    loaded = TrainState(state["step"], params, statistics, opt_state=())
    return Checkpoint(checkpoint, from_saved(config), loaded)


def load_for(
    workdir: epath.PathLike,
    data: Dataset,
    checkpoint: epath.PathLike | None,
    dataset: DatasetConfig | None,
) -> tuple[Checkpoint, DatasetConfig]:
    """Loads the checkpoint that a data set is evaluated or encoded with; see `llvq.evaluate`.

    Returns:
      The checkpoint, and what the data set is.
    """
    source = workdir if checkpoint is None else checkpoint
    find(source)  # before a workdir is made
    require_writable(workdir)
    found = load(source)
    own = found.config.dataset
    if dataset is not None and own.name and dataset.name != own.name:
        raise UserError(
            f"{found.path} is of the data set {own.name!r}, not of {dataset.name!r}: name that "
            "one's config file, or leave --config out"
        )
    check_data(data, found.config.model.image_shape)
    return found, dataset or own


def config_of(path: epath.PathLike) -> TrainConfig:
    """The config of the newest checkpoint whose config can be read; see `find` for the path.

    Raises:
      UserError: if there is no checkpoint, or none can be read.
    """
    candidates = _candidates(path, "train first, or name one with --checkpoint")
    for checkpoint in candidates:
        try:
            return from_saved(_read_json(checkpoint)[0])
        except UserError:
            raise
        except Exception as error:
            reason = first_line(error)
    raise UserError(f"checkpoint {candidates[0]} cannot be read ({reason}): name another one")


def resume(workdir: epath.PathLike, make_like: Callable[[SavedConfig], Any]) -> Any | None:
    """The state that a run resumes from, of its newest sound checkpoint; None if it has none.

    Damaged ones, which would be in the way when their steps are saved again, are renamed to
    STEP.damaged, with a warning. Call it before the manager is opened, in all processes.

    Args:
      workdir: of the run.
      make_like: maps the config of a checkpoint, as nested dicts, to the structure, shapes and
        dtypes of its state; raises UserError if the run cannot resume from it.

    Raises:
      UserError: if `make_like` does, if no checkpoint is sound, or if the newest is for inference
        only.
    """
    directory = absolute(workdir) / "checkpoints"
    checkpoints = _finished(directory)
    if checkpoints and _is_for_inference(checkpoints[0]):
        raise UserError(
            f"{checkpoints[0]} has no optimizer, so that no run can resume from it: start one from "
            f"its parameters, in another --workdir, with --config.init_from={checkpoints[0]}"
        )
    remedy = "delete what is damaged to start anew, or use another --workdir"
    found = _newest_sound(
        directory, checkpoints, lambda config, _: parts(make_like(config)), remedy
    )
    if found is None:
        return None
    newest, (config, state), damage = found
    if jax.process_index() == 0:
        # The manager ranks by the metrics of older ones, too.
        for checkpoint in checkpoints[checkpoints.index(newest) + 1 :]:
            try:
                _read_json(checkpoint)
            except Exception as error:
                damage[checkpoint] = DamageError(first_line(error))
        for checkpoint, reason in damage.items():
            _set_aside(checkpoint, reason, newest)
    multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
    return make_like(config).replace(**state)


def model_of(checkpoint: Checkpoint) -> VQVAE:
    """The model that a checkpoint holds.

    Raises:
      UserError: if the model needs float64 and JAX lacks it.
    """
    factory.require_x64(checkpoint.config.compute_dtype)
    graphdef = nnx.graphdef(factory.abstract_model(checkpoint.config.architecture))
    params, statistics = jax.device_put((checkpoint.state.params, checkpoint.state.statistics))
    return nnx.merge(graphdef, params, statistics)


def _is_for_inference(checkpoint: epath.Path) -> bool:
    """Whether `save_for_inference` wrote a checkpoint, as far as can be told if it is damaged."""
    try:
        saved = _saved_parts(checkpoint)
    except Exception:
        return False
    return "params" in saved and "opt_state" not in saved


def _saved_parts(checkpoint: epath.Path) -> Collection[str]:
    return ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree.keys()


def _set_aside(checkpoint: epath.Path, reason: DamageError, newest: epath.Path) -> None:
    names = (f"{checkpoint.name}.damaged{suffix}" for suffix in ("", *range(2, 1000)))
    aside = next(path for path in map(checkpoint.parent.joinpath, names) if not path.exists())
    checkpoint.rename(aside)
    logging.warning(
        "Checkpoint %s cannot be read (%s): going on from %s, and it is now %s",
        checkpoint,
        reason,
        newest,
        aside,
    )


def _candidates(path: epath.PathLike, remedy: str) -> list[epath.Path]:
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
        raise UserError(f"no checkpoint in {root}: {remedy}")
    return checkpoints


def _finished(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints in a directory, newest first, but for what is still being written."""
    steps = [
        int(child.name)
        for child in (directory.iterdir() if directory.is_dir() else ())
        # On a bucket what is being written has its final name already.
        if child.name.isdecimal() and ocp.utils.is_checkpoint_finalized(child)
    ]
    return [directory / str(step) for step in sorted(steps, reverse=True)]


def _read_json(checkpoint: epath.Path) -> tuple[Any, Any, dict[str, Any] | None]:
    """(config, metrics, digests) of a checkpoint; raises whatever Orbax does, and ValueError."""
    reader = ocp.JsonCheckpointHandler()
    config = reader.restore(checkpoint / "config")
    metrics = None
    if (checkpoint / "metrics").exists():
        metrics = ocp.JsonCheckpointHandler("metrics").restore(checkpoint / "metrics")
    found = None
    if (checkpoint / "digests").exists():  # the first versions wrote none
        found = reader.restore(checkpoint / "digests")
        _compare(digests({}, config, metrics), found)
    return config, metrics, found


def _compare(actual: Mapping[str, str], saved: Mapping[str, Any]) -> None:
    for part, digest in actual.items():
        if saved[part] != digest:
            raise ValueError(f"its {part} is not what was saved")


_MakeLike = Callable[[SavedConfig, Collection[str]], Tree]


def _read(checkpoint: epath.Path, make_like: _MakeLike) -> tuple[SavedConfig, Tree]:
    """A checkpoint's config and state, compared with its digests.

    Orbax's handlers read it, which do not wait for other processes as its manager does.

    Args:
      checkpoint: the directory.
      make_like: maps the config, and the names of the parts that were saved, to the structure,
        shapes and dtypes of the wanted parts of the state.

    Returns:
      The config, and the part of the state in NumPy arrays.

    Raises:
      DamageError: if anything is missing or cannot be read, or is not what was saved.
      UserError: if `make_like` does, over a config that is sound.
    """
    try:
        config, metrics, saved_digests = _read_json(checkpoint)
        like = make_like(config, _saved_parts(checkpoint))
        like = {name: tree for name, tree in like.items() if jax.tree.leaves(tree)}
        is_old = "opt_state" in like and (saved_digests or {}).get("format") == 2
        if is_old:
            like = {**like, "opt_state": like["opt_state"][0]}
        state = ocp.PyTreeCheckpointHandler().restore(
            checkpoint / "state",
            args=ocp.args.PyTreeRestore(
                like,
                # Arrays keep the dtype that was saved.
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like),
                partial_restore=True,
            ),
        )
        if saved_digests is not None:
            _compare(digests(state, config, metrics), saved_digests)
        state = jax.tree.map(_convert, state, like)
        if is_old:
            count = optax.ScaleByScheduleState(state["step"].astype(np.int32))
            state["opt_state"] = (state["opt_state"], count)
        return config, state
    except UserError:
        raise
    except Exception as error:
        raise DamageError(first_line(error)) from error


def _convert(array: np.ndarray, wanted: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise ValueError("an array is missing")
    if array.shape != wanted.shape:
        raise ValueError(f"an array has the shape {array.shape}, not {wanted.shape}")
    return array.astype(wanted.dtype)


_NOTHING_THERE, _NONE_SOUND, _UNNUMBERED = -1, -2, -3

_Read = tuple[SavedConfig, Tree]


def _newest_sound(
    directory: epath.Path,
    checkpoints: Sequence[epath.Path],
    make_like: _MakeLike,
    remedy: str,
) -> tuple[epath.Path, _Read, dict[epath.Path, DamageError]] | None:
    """Reads the newest checkpoint that is sound; of several processes, process 0 decides which.

    Args:
      directory: where the checkpoints are.
      checkpoints: in it, newest first. Only process 0's list matters, except for a single
        checkpoint that was named explicitly.
      make_like: as for `_read`.
      remedy: for a run without a sound checkpoint.

    Returns:
      The checkpoint, what was read of it, and, on process 0, why those before it could not be; None
      if there are no checkpoints.

    Raises:
      UserError: if none is sound, or `make_like` raises it.
    """
    damage: dict[epath.Path, DamageError] = {}
    step = _NONE_SOUND if checkpoints else _NOTHING_THERE
    read: _Read | None = None
    if jax.process_index() == 0:
        for checkpoint in checkpoints:
            try:
                read = _read(checkpoint, make_like)
            except DamageError as error:
                damage[checkpoint] = error
                continue
            except UserError:
                pass  # every process gets it below
            step = int(checkpoint.name) if checkpoint.name.isdecimal() else _UNNUMBERED
            break
    step = _of_first_process(step)
    if step == _NOTHING_THERE:
        return None
    reason: Any = next(iter(damage.values()), "see what process 0 says")
    if step != _NONE_SOUND:
        checkpoint = checkpoints[0] if step == _UNNUMBERED else directory / str(step)
        try:
            return checkpoint, read or _read(checkpoint, make_like), damage
        except DamageError as error:
            reason = error
    newest = checkpoints[0] if checkpoints else directory
    others = f", nor can the {len(checkpoints) - 1} before it" if len(checkpoints) > 1 else ""
    raise UserError(f"checkpoint {newest} cannot be read ({reason}){others}: {remedy}")


def _of_first_process(number: int) -> int:
    """The number of process 0, for all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
