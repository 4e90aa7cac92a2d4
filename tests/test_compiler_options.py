"""Compiler options of other versions than these are left out, said once."""

import jax
import pytest
from jax.experimental import topologies

from llvq.runtime import sharding


@pytest.fixture
def made_up(monkeypatch):
    """Options with one that no compiler knows, for all platforms; forgotten afterwards."""
    options = {name: {**known, "xla_made_up": 3} for name, known in _known().items()}
    monkeypatch.setattr(sharding, "_COMPILER_OPTIONS", options)
    sharding._known_options.cache_clear()
    yield
    sharding._known_options.cache_clear()


def _known():
    return sharding._COMPILER_OPTIONS


def _compile(mesh, options):
    number = jax.ShapeDtypeStruct((), "float32", sharding=sharding.replicated(mesh))
    jax.jit(lambda x: x + 1).lower(number).compile(compiler_options=options)


def test_an_unknown_option_is_left_out_and_named_once(made_up, caplog):
    mesh = sharding.make_mesh()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_made_up"):
        _compile(mesh, sharding._COMPILER_OPTIONS["cpu"])
    options = sharding.compiler_options(mesh)
    _compile(mesh, options)
    assert set(options) == {"xla_cpu_experimental_ynn_fusion_type"}
    assert sharding.compiler_options(mesh) == options
    (message,) = caplog.messages
    assert "xla_made_up" in message


def test_a_tpu_that_does_not_exist_is_asked_too(made_up):
    pytest.importorskip("libtpu")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = sharding.make_mesh(topology.devices)
    options = sharding.compiler_options(mesh)
    assert set(options) == {
        "xla_tpu_run_space_to_batch",
        "xla_tpu_run_space_to_batch_on_new_platforms",
    }
    _compile(mesh, options)


def test_every_option_is_known_to_the_installed_compiler():
    assert sharding.compiler_options(sharding.make_mesh()) == sharding._COMPILER_OPTIONS["cpu"]
