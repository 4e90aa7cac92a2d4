"""Memory that XLA frees on a CPU is kept: the kernel is not asked for it again each step."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from llvq.runtime import host_memory

ROOT = pathlib.Path(__file__).parents[1]

_COUNT_FAULTS = """
import resource
from benchmarks.train_step import get_config, prepare_llvq
from llvq.runtime import host_memory
if {keeps}:
    host_memory.keep_freed_memory()
config = get_config("fashion_mnist", "sparse_lattice")
config.batch_size = 32
run = prepare_llvq(config, "train").run
run(15)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.skipif(
    _HUGE_PAGES.exists() and "[always]" in _HUGE_PAGES.read_text(),
    reason="with huge pages there are few faults to be counted",
)
def test_a_step_finds_the_memory_of_the_one_before():
    ours = ("XLA_FLAGS", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in ours}

    def count_faults(keeps):
        command = [sys.executable, "-c", _COUNT_FAULTS.format(keeps=keeps)]
        options = {"env": environment, "capture_output": True, "text": True, "check": True}
        return int(subprocess.run(command, cwd=ROOT, **options).stdout)

    # Now and then a hole in the heap is too small, and it grows once more.
    assert count_faults(True) < count_faults(False) / 2


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["libtpu"], True),
        ("cuda,cpu", [], False),
        ("", [], True),
        ("", ["jax_plugins"], False),
        ("", ["libtpu"], False),
        ("", ["an entry point"], False),
    ],
)
def test_only_where_there_is_no_accelerator(platforms, plugins, expected, monkeypatch):
    monkeypatch.setattr(
        host_memory.importlib.util, "find_spec", lambda name: name in plugins or None
    )
    entry_points = [name for name in plugins if name == "an entry point"]
    monkeypatch.setattr(
        host_memory.metadata, "entry_points", lambda group: {"jax_plugins": entry_points}[group]
    )
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
