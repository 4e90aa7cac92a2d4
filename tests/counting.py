"""Counts the rows of an array as training and evaluation do."""

import functools

import jax
import numpy as np

from llvq.runtime import sharding
from llvq.usage.counting import count_codes
from llvq.usage.table import BUDGET, CodebookUsage


@functools.cache
def counting_step(code_width, mesh):
    return jax.jit(functools.partial(count_codes, code_width=code_width, mesh=mesh))


def count(codes, batch_size, *, devices=None, budget=BUDGET):
    """The usage of codes [n, width], this process's share, in batches of this process.

    As in training: on the devices, in the table, over all hosts.

    The last batch is filled up with a code that must not count.
    """
    mesh = sharding.make_mesh(jax.devices()[:1] if devices is None else devices)
    step = counting_step(codes.shape[1], mesh)
    usage = CodebookUsage(budget)
    for start in range(0, len(codes), batch_size):
        batch = codes[start : start + batch_size]
        filling = batch_size - len(batch)
        mask = np.pad(np.ones(len(batch), bool), (0, filling))
        batch = np.pad(batch, ((0, filling), (0, 0)), constant_values=123456789)
        on_devices = (sharding.to_devices(x, mesh) for x in (batch, mask))
        usage.add(step(*on_devices, usage.levels(mesh)))
    return usage.over_all_hosts()


def count_on_host(codes, batch_size, *, budget=BUDGET):
    """The usage of codes [n, width], as in evaluation: from images of one code each."""
    usage = CodebookUsage(budget)
    for start in range(0, len(codes), batch_size):
        usage.add_codes(codes[start : start + batch_size, None, None])
    return usage
