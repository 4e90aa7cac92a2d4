"""The host's memory, for steps on a CPU."""

import ctypes
import importlib.util
from importlib import metadata
from typing import Any

import jax

# Of mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets the C library keep memory that is freed, where JAX has a CPU only.

    XLA allocates what a step needs at its beginning and frees it at its end; to get all of it from
    the kernel again each time takes from a tenth to a quarter of a step. The price is that memory
    in use never shrinks, and that its peak may grow by half, by what lies between. Call it before
    JAX has started its threads. Of C libraries only glibc can be told; with others nothing changes.
    """
    if not _has_cpu_only():
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_ARENA_MAX, 1)  # other arenas than the main one take large blocks from the kernel


def _has_cpu_only() -> bool:
    """Whether JAX is told to use the CPU, or is installed for nothing else.

    Asking it what it finds would start its threads. So where a plugin for accelerators is installed
    and there are none, it takes JAX_PLATFORMS=cpu.
    """
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_platforms:
        return bool(config.jax_platforms == "cpu")
    packages = ("jax_plugins", "libtpu")
    return not any(map(importlib.util.find_spec, packages)) and not metadata.entry_points(
        group="jax_plugins"
    )
