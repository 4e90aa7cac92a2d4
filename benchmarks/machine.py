"""The machine, in words, for tables."""

import os

import jax


def describe() -> str:
    """For instance "2 CPU cores" or "8 × NVIDIA H100 80GB HBM3"."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{len(devices)} × {devices[0].device_kind}"
