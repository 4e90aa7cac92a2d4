"""Devices: a mesh of the axes `data` and `height`; all but images and their codes is replicated.

Batches are split along `data`. Where their size does not divide by the devices, as where these are
more, each image is split along `height` besides: XLA exchanges the rows that a convolution needs
from either side.
"""

import collections
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from llvq.errors import UserError

# What XLA may leave to YNNPACK: products and sums, but not convolutions, as it does by default: the
# gradients of their kernels take far longer than Eigen's. Known to jaxlib 0.10.2 and 0.11.2.
_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}
# Space-to-batch makes one batch of the strips of few images, and undoes it, around every layer: of
# FFHQ's packed images (see `convolution`), four a chip, it triples the traffic, by the compiler's
# count. Known to libtpu of jax 0.10.2 and 0.11.2.
_TPU = {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
}
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": _CPU, "tpu": _TPU}


def make_mesh(devices: Sequence[jax.Device] | None = None, *, height: int = 1) -> Mesh:
    """A mesh of the given devices, of all devices of all hosts by default.

    Args:
      devices: to be used.
      height: how many of them share an image; they should be neighbours in the sequence.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(-1, height), ("data", "height"))


def mesh_for_batches(
    batch_size: int, latent_height: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh on which every device gets an equal share of a batch.

    Args:
      batch_size: over all devices; images are split only if this does not divide by the devices.
      latent_height: rows of latents an image has.
      devices: to be used, all devices of all hosts by default.

    Raises:
      UserError: if there is no such mesh.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
    height = len(devices) // math.gcd(batch_size, len(devices))
    of_hosts = collections.Counter(device.process_index for device in devices)
    of_a_host = of_hosts[devices[0].process_index]
    if set(of_hosts.values()) != {of_a_host}:
        raise UserError(
            f"the {len(of_hosts)} processes have {', '.join(map(str, of_hosts.values()))} "
            "devices: give each of them equally many"
        )
    # A host reads whole images: no two hosts share one.
    if latent_height % height or of_a_host % height:
        raise UserError(
            f"batch_size={batch_size} does not divide by the {len(devices)} devices: use a number "
            f"of devices that it divides by, or set --config.batch_size to a multiple of "
            f"{len(devices)}"
        )
    return make_mesh(devices, height=height)


def describe(mesh: Mesh) -> str:
    """The machine in words, e.g. "8 × NVIDIA H100 80GB HBM3" or "2 CPU cores"."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{mesh.size} × {device.device_kind}"


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """What the compiler of a mesh's devices is to be told of steps on images."""
    return _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays, the same in all processes, on every device."""
    # By way of the host: from device to device a CPU's processes can send nothing.
    return jax.device_put(jax.device_get(tree), replicated(mesh))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the groups of devices that share images."""
    return NamedSharding(mesh, PartitionSpec("data"))


def images_sharded(mesh: Mesh) -> NamedSharding:
    """Of images and their codes, the leading two axes split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data", "height"))


def steps_sharded(mesh: Mesh) -> NamedSharding:
    """Of batches, one after another in the leading axis, the second axis split like a batch's."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def device_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "height")))


def to_devices(
    local: Shaped[np.ndarray, "local_batch ..."], mesh: Mesh
) -> Shaped[Array, "global_batch ..."]:
    """One global array, split over the mesh, from each host's share of it.

    Of more axes than one, the second is the images' height.
    """
    split = batch_sharded(mesh) if local.ndim == 1 else images_sharded(mesh)
    return jax.make_array_from_process_local_data(split, local)
