"""Whether a checkpoint is what was saved, and whether there is room to save one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llvq.errors import UserError

_NUM_BYTES_OF_METADATA = 2**18  # more than Orbax writes besides the arrays


def digests(state: dict[str, Any], config: Any, metrics: Any) -> dict[str, str]:
    """A hash of each part of a checkpoint, independent of how it is stored and sharded.

    TensorStore checks its index, but not the arrays.
    """
    return {
        "config": _of_json(config),
        "metrics": _of_json(metrics),
        **{name: _of_arrays(tree) for name, tree in state.items()},
    }


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_arrays(tree: Any) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(tree)):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def require_room(directory: epath.Path, tree: Any) -> None:
    """Raises OSError if the disk lacks room for arrays; Orbax would print pages of tracebacks."""
    if "://" in os.fspath(directory) or jax.process_index() != 0:  # buckets are never full
        return
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(tree)) + _NUM_BYTES_OF_METADATA
    if shutil.disk_usage(directory).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def require_writable(workdir: epath.PathLike) -> None:
    """Makes the workdir if need be.

    Raises:
      UserError: if files cannot be written to it, or if it is not the same for all processes.
    """
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


def remove(directory: epath.Path) -> None:
    """Deletes what a save that failed has written, under its own and temporary names."""
    _remove_tree(directory)
    remove_leftovers(directory)


def remove_leftovers(directory: epath.Path) -> None:
    """Deletes what a save that failed has written under temporary names."""
    for leftover in directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*"):
        _remove_tree(leftover)


def _remove_tree(directory: epath.Path) -> None:
    with contextlib.suppress(OSError):  # it may be gone, or still be written to
        directory.rmtree()
