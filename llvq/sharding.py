"""Devices: one mesh axis, `data`; batches are split along it, everything else is replicated."""

import os
from collections.abc import Sequence

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


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets an equal share of a batch."""
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
