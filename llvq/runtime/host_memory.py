"""Sets how the C library manages the host's memory, which matters for steps on a CPU."""

import ctypes
import importlib.util
from importlib import metadata
from typing import Any

import jax

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory, if JAX uses the CPU only.

    XLA allocates memory when a step begins and frees it when the step ends. Getting it from the
    kernel again each time takes a tenth to a quarter of the step. In exchange, the memory in use
    never shrinks, and fragmentation may raise its peak by half. Call this before JAX starts its
    threads. It sets options of glibc and does nothing with other C libraries.
    """
    if not _has_cpu_only():
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_ARENA_MAX, 1)  # arenas other than the main one take large blocks from the kernel


def _has_cpu_only() -> bool:
    """Says whether JAX is configured or installed for the CPU only.

    It cannot ask JAX for its devices, because that starts JAX's threads. So on a machine with a
    plugin for accelerators but no accelerator, it returns True only if JAX_PLATFORMS=cpu is set.
    """
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_platforms:
        return bool(config.jax_platforms == "cpu")
    packages = ("jax_plugins", "libtpu")
    return not any(map(importlib.util.find_spec, packages)) and not metadata.entry_points(
        group="jax_plugins"
    )
