"""Time and memory of a step, of llvq and of others, run in turns.

A contender is prepared once and then run in turns with the others. The n-th times of all contenders
are neighbours, and a ratio is the median of the ratios of neighbours. So whatever slows down the
machine for a while slows down all of them.
"""

import functools
import gc
import json
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

Run = Callable[[int], None]
"""Makes this number of calls, usually of one step each, and returns when the last is done."""


class Contender(NamedTuple):
    """Attributes:
    run: see `Run`. It has already compiled and tuned itself.
    memory_bytes: of a call, including parameters, optimizer and inputs; None if unknown.
    steps_per_call: how many steps a call takes.
    work: what a step does, in the units of `ceilings`, as XLA counts it.
    """

    run: Run
    memory_bytes: int | None
    steps_per_call: int = 1
    work: Mapping[str, float] = {}


class Case(NamedTuple):
    """Attributes:
    setting: distinguishes it from other cases; each entry is a column of the table.
    amount: what a step handles, e.g. how many images.
    contenders: by name; all others are compared with those that have "llvq" in their names.
    """

    setting: dict[str, Any]
    amount: int
    contenders: dict[str, Callable[[], Contender]]


# The threads of the library that ran before may go on spinning for some milliseconds.
_PAUSE_SECONDS = 0.02


def calls(step: Callable[[], Any]) -> Run:
    """Makes a `Run` of a step in JAX that returns its results."""
    is_cpu = jax.default_backend() == "cpu"

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            results = step()
            if is_cpu:  # which might run several steps at once
                jax.block_until_ready(results)
        jax.block_until_ready(results)

    return run


def torch_calls(step: Callable[[], Any]) -> Run:
    """Makes a `Run` of a step in PyTorch, on the kind of device that JAX uses."""
    import torch

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            step()
        if torch_device() == "cuda":
            torch.cuda.synchronize()

    return run


def torch_device() -> str:
    """Returns PyTorch's name of the kind of device that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def interleave(
    runs: Mapping[str, Run], repeats: int, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Measures `repeats` times, in turns, the seconds that a call of each contender takes.

    Args:
      runs: by name; each has run before.
      repeats: how often each is timed.
      min_seconds: a timed run has as many calls as fill this time.
    """

    def seconds(run: Run, num_calls: int) -> float:
        time.sleep(_PAUSE_SECONDS)
        start = time.perf_counter()
        run(num_calls)
        return (time.perf_counter() - start) / num_calls

    num_calls = dict.fromkeys(runs, 1)
    if min_seconds:
        num_calls = {name: math.ceil(min_seconds / seconds(run, 1)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        # The order alternates, so that no contender always follows the same one.
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            times[name].append(seconds(runs[name], num_calls[name]))
    return times


def compare(
    contenders: Mapping[str, Callable[[], Contender]], repeats: int, min_seconds: float
) -> tuple[dict[str, list[float] | None], dict[str, Contender]]:
    """Returns seconds per step by contender, None if memory is too small, and those that ran."""
    prepared: dict[str, Contender] = {}
    for name, prepare in contenders.items():
        try:
            prepared[name] = prepare()
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
        gc.collect()  # frees what a failed attempt has left
    runs = {name: contender.run for name, contender in prepared.items()}
    times = {
        name: [seconds / prepared[name].steps_per_call for seconds in seconds_per_call]
        for name, seconds_per_call in interleave(runs, repeats, min_seconds).items()
    }
    return {name: times.get(name) for name in contenders}, prepared


def lacks_memory(error: BaseException) -> bool:
    """Says whether an exception of JAX or PyTorch says that memory is too small."""
    text = str(error).lower()
    signs = ("out of memory", "resource_exhausted", "allocate memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def ceilings() -> dict[str, float]:
    """Measures what the first device reaches per second.

    Returns:
      `memory`: bytes read and written by a copy. `float32`, `tf32` and `bfloat16`: floating-point
      operations of a matrix product in this arithmetic (`tf32` where the device has it).
    """
    is_cpu = jax.default_backend() == "cpu"
    values = jax.random.normal(jax.random.key(0), (2**24 if is_cpu else 2**28,))
    side = 1024 if is_cpu else 8192
    square = values[: side * side].reshape(side, side)
    runs = {"memory": calls(functools.partial(jax.jit(lambda x: x + 1), values))}
    for name, dtype, precision in (
        ("float32", jnp.float32, "highest"),
        ("tf32", jnp.float32, "default"),
        ("bfloat16", jnp.bfloat16, "default"),
    ):
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        runs[name] = calls(functools.partial(product, *[square.astype(dtype)] * 2))
    for run in runs.values():
        run(1)
    work = dict.fromkeys(runs, 2.0 * side**3) | {"memory": 2.0 * values.nbytes}
    seconds = interleave(runs, repeats=5, min_seconds=0.05)
    return {name: work[name] / statistics.median(times) for name, times in seconds.items()}


def work(compiled: jax.stages.Compiled, arithmetic: str) -> dict[str, float]:
    """Returns what a step of a compiled program does, as XLA counts it.

    The body of a loop over steps counts once. On a GPU XLA does not count the arithmetic of
    cuDNN's convolutions, which is nearly all of it.
    """
    cost: Any = compiled.cost_analysis()
    counted = {"memory": cost["bytes accessed"]}
    return counted if jax.default_backend() == "gpu" else counted | {arithmetic: cost["flops"]}


def compiled_memory(compiled: jax.stages.Compiled) -> int:
    """Adds up the bytes that XLA has planned for a call: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def torch_memory(run: Run, tensors: Iterable[Any]) -> int:
    """Does the same for PyTorch: the tensors that stay, and the most that a step allocates besides.

    Neither function counts what libraries allocate by other means, such as oneDNN's scratch memory.
    """
    import torch

    kept = list(tensors)
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    if kept[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return total + torch.cuda.max_memory_allocated() - before
    # On a CPU, PyTorch counts allocations only while it is profiled.
    with torch.profiler.profile(profile_memory=True) as profile:
        run(1)
    with tempfile.TemporaryDirectory() as directory:
        trace = pathlib.Path(directory) / "trace.json"
        profile.export_chrome_trace(os.fspath(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return total + max(sizes, default=0)


def versions(*packages: str) -> str:
    """Lists the versions of Python and of installed packages."""
    found = (f"{package} {metadata.version(package)}" for package in packages)
    return ", ".join((f"Python {platform.python_version()}", *found))
