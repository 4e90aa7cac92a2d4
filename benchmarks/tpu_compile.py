r"""What a training step takes on a TPU, by the TPU compiler's own account; needs no TPU.

    python benchmarks/tpu_compile.py --config=configs/ffhq1024.py:sparse_lattice \
        [--topology=v5p:2x2x1] [--chips=1] [--config.batch_size=32]

Needs `pip install "jax[tpu]"`. The times are the least that memory and arithmetic allow (the larger
of the two; a roofline), not measurements.
"""

import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

# The compiler is all that is used of libtpu: no search for a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import optax
from absl import app, flags
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import config_flags

from llvq import configuration, train_state
from llvq.train_step import make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. …:vq.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "As the TPU compiler names it.")
_CHIPS = flags.DEFINE_integer("chips", 1, "How many of its chips share the batch.", lower_bound=1)

# Of a chip: memory in GB, its bandwidth in GB/s, bfloat16 arithmetic in TFLOP/s
# (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
CHIPS = {
    "v4": (32, 1228, 275),
    "v5e": (16, 819, 197),
    "v5p": (95, 2765, 459),
    "v6e": (32, 1640, 918),
}


def main(argv: Sequence[str]) -> None:
    """Compiles one step and prints a table in Markdown."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    config = _CONFIG.value
    configuration.validate(config)
    kind = _TOPOLOGY.value.partition(":")[0]
    if kind not in CHIPS:
        raise app.UsageError(f"--topology={_TOPOLOGY.value}: known are {', '.join(CHIPS)}")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value)
    if _CHIPS.value > len(topology.devices):
        raise app.UsageError(f"--chips={_CHIPS.value}: {_TOPOLOGY.value} is smaller")
    mesh = Mesh(np.asarray(topology.devices[: _CHIPS.value]), ("data",))

    optimizer = optax.adam(config.learning_rate)
    model = train_state.create_model(
        config.model, config.quantizer, config.compute_dtype, config.seed
    )
    graphdef, state = train_state.create_train_state(model, optimizer)
    _, param_dtype = train_state.DTYPES[config.compute_dtype]
    step: Any
    step, _ = make_train_step(graphdef, optimizer, config.model.value_range, param_dtype, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    images = jax.ShapeDtypeStruct((config.batch_size, *config.model.image_shape), jnp.uint8)

    start = time.monotonic()
    try:
        compiled = step.lower(shapes, images).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"does not fit into the memory of a {kind} chip: {str(error).splitlines()[0]}")
    seconds = time.monotonic() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    images_per_chip = config.batch_size / _CHIPS.value
    capacity, bandwidth, speed = CHIPS[kind]
    needed = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9
    gigabytes, teraflops = cost["bytes accessed"] / 1e9, cost["flops"] / 1e12
    least = max(gigabytes / bandwidth, teraflops / speed)
    rows = {
        "step": f"{config.dataset.name}, {config.quantizer.name}, {config.compute_dtype}",
        "images a chip": f"{images_per_chip:g} (on {_CHIPS.value} of {_TOPOLOGY.value})",
        "memory a chip": f"{needed:.1f} GB of {capacity} GB",
        "memory traffic": f"{gigabytes / images_per_chip:.2f} GB an image",
        "arithmetic": f"{1e3 * teraflops / images_per_chip:.1f} GFLOP an image",
        "time, at least": f"{1e3 * least:.0f} ms: at most {images_per_chip / least:.0f} images/s",
        "compilation": f"{seconds:.0f} s",
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    app.run(main)
