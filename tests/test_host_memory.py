"""Memory that XLA frees on a CPU is kept: the kernel is not asked for it again each step."""

import platform
import subprocess
import sys

import pytest

from llvq import host_memory

_COUNT_FAULTS = """
import resource, jax
from jax import numpy as jnp
from llvq import host_memory
if {keeps}:
    host_memory.keep_freed_memory()
x = jnp.ones((4_000, 4_000))  # 64 MB, as are the temporaries
step = jax.jit(lambda x: jnp.sort(jnp.sort(x, 0), 1).sum())
for _ in range(2):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_step_finds_the_memory_of_the_one_before():
    def count_faults(keeps):
        command = [sys.executable, "-c", _COUNT_FAULTS.format(keeps=keeps)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pages = 4_000 * 4_000 * 4 // 4096
    assert count_faults(False) > pages
    assert count_faults(True) < pages / 10


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["libtpu"], True),
        ("cuda,cpu", [], False),
        ("", [], True),
        ("", ["jax_plugins"], False),
        ("", ["libtpu"], False),
    ],
)
def test_only_where_there_is_no_accelerator(platforms, plugins, expected, monkeypatch):
    monkeypatch.setattr(
        host_memory.importlib.util, "find_spec", lambda name: name in plugins or None
    )
    monkeypatch.setattr(host_memory.metadata, "entry_points", lambda group: [])
    before = host_memory.jax.config.jax_platforms
    host_memory.jax.config.update("jax_platforms", platforms or None)
    try:
        assert host_memory._has_cpu_only() is expected
    finally:
        host_memory.jax.config.update("jax_platforms", before)


def test_other_c_libraries_are_left_alone(monkeypatch):
    def fail(name):
        raise OSError(f"{name}: no such library")

    monkeypatch.setattr(host_memory.ctypes, "CDLL", fail)
    host_memory.keep_freed_memory()
