"""Evaluates at full size in a process of its own: python -m tests.run_ffhq_size DIR.

DIR/manual holds a few 1024×1024 images in the official layout. Prints, as JSON, the results and
the highest memory that the process ever had, in bytes.
"""

import json
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["NO_GCE_CHECK"] = "true"

import jax

from configs import ffhq1024 as ffhq1024_config
from input_pipeline import ffhq1024
from llvq import checkpointing
from llvq.config import to_dict
from llvq.evaluate import evaluate
from tests.runs import create_state

NUM_IMAGES = {"train": 2, "validation": 3}

if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    config = ffhq1024_config.get_config("dense_lattice")
    config.batch_size = 2
    data = ffhq1024.load(str(directory / "data"), str(directory / "manual"), num_images=NUM_IMAGES)
    state = create_state(config)
    with checkpointing.open_manager(directory / "run", 1) as manager:
        checkpointing.save(manager, 1, state, to_dict(config), None)
    results = evaluate(directory / "run", data)
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({**results, "peak_bytes": peak, "num_devices": jax.device_count()}))
