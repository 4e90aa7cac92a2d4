"""Every test sees eight virtual CPU devices, so that whatever is tested is tested sharded.

With LLVQ_TEST_DEVICES=default, tests see the devices that JAX finds, such as a GPU, instead;
benchmarks/on_accelerator.sh runs those that can do with one.
"""

import atexit
import importlib.util
import os
import shutil
import tempfile

_DEVICES = os.environ.get("LLVQ_TEST_DEVICES", "cpu")
if _DEVICES == "cpu":
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 "
        # The tests compile for longer than they compute.
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
else:  # the oracles are more exact than TF32
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["NO_GCE_CHECK"] = "true"

# Each program is compiled once for all tests and the processes that they start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if importlib.util.find_spec("triton"):
    import triton  # noqa: F401  both bring an LLVM, and it crashes when TensorFlow's comes first

import jax
import pytest
from hypothesis import HealthCheck, settings

from benchmarks import settings as _  # noqa: F401  stands in for ml_collections on a bare machine

# Fuzzing: a few examples by default, more with --hypothesis-profile=all, always the same ones; with
# --hypothesis-profile=long many, others each time. There is no database, since what was found
# belongs into a test. The tests have deadlines of their own.
_common = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("default", max_examples=12, derandomize=True, **_common)
settings.register_profile("all", max_examples=120, derandomize=True, **_common)
settings.register_profile("long", max_examples=2200, derandomize=False, **_common)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """Whatever a test module does on import: what is tested sharded stays so."""
    assert _DEVICES != "cpu" or jax.device_count() == 8


@pytest.fixture(scope="session", autouse=True)
def _few_images_at_a_time():
    """Codes are computed for as many images as fill a device; the tests have only some dozens."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("constriction"):  # a machine with a GPU may lack it
            patch.setattr("llvq.codec.passes._PIXELS_PER_DEVICE", 2**10)
        yield
