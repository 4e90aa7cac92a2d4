"""Devices: one mesh axis, `data`; batches are split along it, everything else is replicated."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from llvq.errors import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, of all devices of all hosts by default."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def describe(mesh: Mesh) -> str:
    """The machine in words, e.g. "8 × NVIDIA H100 80GB HBM3" or "2 CPU cores"."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{mesh.size} × {device.device_kind}"


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays, the same in all processes, on every device."""
    # By way of the host: from device to device a CPU's processes can send nothing.
    return jax.device_put(jax.device_get(tree), replicated(mesh))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets an equal share of a batch, every process too."""
    num_local, num_processes = len(mesh.local_devices), jax.process_count()
    if num_local * num_processes != mesh.size:
        raise UserError(
            f"this process has {num_local} of the {mesh.size} devices of {num_processes} "
            "processes: give each of them equally many"
        )
    if batch_size % mesh.size:
        raise UserError(
            f"batch_size={batch_size} does not divide by the {mesh.size} devices: "
            f"set --config.batch_size to a multiple of {mesh.size}"
        )


def to_devices(
    local: Shaped[np.ndarray, "local_batch ..."], mesh: Mesh
) -> Shaped[Array, "global_batch ..."]:
    """One global array, split over the mesh, from each host's share of it."""
    return jax.make_array_from_process_local_data(batch_sharded(mesh), local)
