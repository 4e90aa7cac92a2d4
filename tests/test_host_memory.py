"""The C library is told to keep freed memory where JAX has a CPU only, and only there."""

import types

import pytest

from llvq.runtime import host_memory

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


@pytest.mark.parametrize("platform", ["cpu", "cuda,cpu"])
def test_freed_memory_is_kept_on_a_cpu_only(platform, monkeypatch):
    told = {}
    library = types.SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    before = host_memory.jax.config.jax_platforms
    host_memory.jax.config.update("jax_platforms", platform)
    try:
        host_memory.keep_freed_memory()
    finally:
        host_memory.jax.config.update("jax_platforms", before)
    kept = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0, M_ARENA_MAX: 1}
    assert told == (kept if platform == "cpu" else {})


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
