"""Every test sees eight virtual CPU devices, so that whatever is tested is tested sharded."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["NO_GCE_CHECK"] = "true"

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """Whatever a test module does on import: what is tested sharded stays so."""
    assert jax.device_count() == 8
