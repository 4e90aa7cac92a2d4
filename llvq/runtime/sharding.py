"""Meshes of devices with the axes `data` and `height`, and how arrays are split over them.

Images and their codes are sharded; everything else is replicated. Batches are split along `data`.
If the batch size is not a multiple of the number of devices, each image is split along `height`
as well, and XLA exchanges the rows that a convolution needs from both sides.
"""

import collections
import functools
import math
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from llvq.errors import UserError

# Experimental options of XLA's compilers: another version may lack them.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # By default, XLA also uses YNNPACK for convolutions. There, gradients of kernels take far
    # longer than with Eigen. In jaxlib 0.10.2 and 0.11.2.
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": (
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
        )
    },
    # Space-to-batch turns the strips of a few images into one batch before every layer, and back
    # after it. By the compiler's count, that triples the traffic for FFHQ's packed images (see
    # `models.packing`), four per chip. In libtpu of jax 0.10.2 and 0.11.2.
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    },
}

# Vector instructions of x86, the widest first, by the kernel's names.
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


def make_mesh(devices: Sequence[jax.Device] | None = None, *, height: int = 1) -> Mesh:
    """Arranges devices in a mesh.

    Args:
      devices: the devices to use; by default, all devices of all hosts.
      height: how many devices share an image; they should be neighbours in the sequence.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices).reshape(-1, height), ("data", "height"))


def mesh_for_batches(
    batch_size: int, latent_height: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes the mesh on which every device gets an equal share of a batch.

    Args:
      batch_size: the number of images over all devices. Images are split only if this is not a
        multiple of the number of devices.
      latent_height: how many rows of latents an image has.
      devices: the devices to use; by default, all devices of all hosts.

    Raises:
      UserError: if there is no such mesh.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
    height = len(devices) // math.gcd(batch_size, len(devices))
    counts = collections.Counter(device.process_index for device in devices)
    per_host = counts[devices[0].process_index]
    if set(counts.values()) != {per_host}:
        raise UserError(
            f"the {len(counts)} processes have {', '.join(map(str, counts.values()))} devices: "
            "give each of them the same number"
        )
    # A host reads whole images, so no two hosts share one.
    if latent_height % height or per_host % height:
        raise UserError(
            f"batch_size={batch_size} does not divide by the {len(devices)} devices: use a number "
            f"of devices that it divides by, or set --config.batch_size to a multiple of "
            f"{len(devices)}"
        )
    return make_mesh(devices, height=height)


def describe(mesh: Mesh) -> str:
    """Names the machine: "8 × NVIDIA H100 80GB HBM3", "2 CPU cores (AMD EPYC 7B13, AVX2)"."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        return f"{mesh.size} × {device.device_kind}"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    processor = _processor(cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{os.cpu_count()} CPU cores ({processor})"


def _processor(cpuinfo: str) -> str:
    """Names the processor of /proc/cpuinfo and its widest vector instructions."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    widest = next((name for flag, name in _VECTORS.items() if flag in flags), "")
    return ", ".join(filter(None, (fields.get("model name") or platform.machine(), widest)))


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Returns the options for compiling steps on images for a mesh; its devices need not exist."""
    here = [x for x in mesh.devices.flat if x.process_index == jax.process_index()]
    return _known_options(here[0])


@functools.cache
def _known_options(device: jax.Device) -> dict[str, Any]:
    """Returns the options that a device's compiler knows; it would reject an unknown one."""
    options = _COMPILER_OPTIONS.get(device.platform, {})
    unknown = {name for name, value in options.items() if not _is_known(device, name, value)}
    if unknown:
        logging.warning(
            "The compiler for %s lacks %s: steps may be slower",
            device.platform,
            ", ".join(sorted(unknown)),
        )
    return {name: value for name, value in options.items() if name not in unknown}


def _is_known(device: jax.Device, name: str, value: Any) -> bool:
    sharding = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    try:
        jax.jit(jnp.negative).lower(number).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if name not in str(error):
            raise
        return False
    return True


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree of arrays, the same in all processes, on every device."""
    # This goes through the host, because processes on CPUs cannot copy from device to device.
    return jax.device_put(jax.device_get(tree), replicated(mesh))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over the groups of devices that share images."""
    return NamedSharding(mesh, PartitionSpec("data"))


def images_sharded(mesh: Mesh) -> NamedSharding:
    """Splits the leading two axes over the devices: for images and their codes."""
    return NamedSharding(mesh, PartitionSpec("data", "height"))


def steps_sharded(mesh: Mesh) -> NamedSharding:
    """Splits the second axis as `batch_sharded` splits the first: for a sequence of batches."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def device_sharded(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "height")))


def to_devices(
    local: Shaped[np.ndarray, "local_batch ..."], mesh: Mesh
) -> Shaped[Array, "global_batch ..."]:
    """Makes one global array, split over the mesh, from each host's share of it.

    Args:
      local: this host's share; if it has several axes, the second one is the images' height.
      mesh: the devices.
    """
    split = batch_sharded(mesh) if local.ndim == 1 else images_sharded(mesh)
    return jax.make_array_from_process_local_data(split, local)
