"""One of two processes that count together: python -m tests.run_counting ADDRESS PROCESS_ID."""

import json
import sys

import jax
import numpy as np

from llvq.usage import table
from tests.counting import count


def stream():
    """30,000 vectors of some 20,000 codes, some frequent; the first entry never changes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-(2**30), 2**30, (50_000, 5)).astype(np.int32)
    codes[:, 0] = 7
    return codes[np.int64(50_000 * rng.random(30_000) ** 3)]


if __name__ == "__main__":
    address, process_id = sys.argv[1:]
    # Small enough for tables to be merged in mid-stream and gathered in many slices.
    table._PENDING = 2000
    jax.distributed.initialize(
        address, 2, int(process_id), initialization_timeout=15, heartbeat_timeout_seconds=10
    )
    share = np.array_split(stream(), 2)[int(process_id)]
    for budget in (table.BUDGET, 1000):
        usage = count(share, 1024, devices=jax.devices(), budget=budget)
        figures = {
            "level": usage.level,
            "num_vectors": usage.num_vectors,
            "num_distinct": usage.num_distinct,
            "entropy": usage.entropy,
            "num_entries_in_use": usage.num_entries_in_use,
        }
        print(json.dumps(figures))
