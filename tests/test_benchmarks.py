"""Benchmarks against PyTorch: both sides do the same, and results are kept and shown correctly."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch")

from benchmarks import codec as codec_benchmark
from benchmarks import (
    comparison,
    growth,
    measure,
    nearest_point,
    quantizer,
    settings,
    start,
    store,
    sweep,
    torch_model,
    tpu_compile,
    train_loop,
)
from benchmarks import train_step as benchmark
from benchmarks.measure import Case, Contender
from llvq import import_torch, quantizers
from llvq.config import parse
from llvq.models import factory
from llvq.quantizers.registry import complete
from llvq.runtime import sharding
from llvq.training import train_state
from llvq.training.objective import Objective, default_weights
from llvq.training.train_step import make_train_step
from tests import real_data, tiny
from tests import torch_model as oracle

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    """Such small tensors are not worth several threads, which would spin."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def llvq_state(model):
    """(params, statistics) of a model in PyTorch."""
    tensors = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
    return jax.tree.map(jnp.asarray, import_torch.parameters_from_state_dict(tensors))


VALUE_RANGE, RATE = (-0.5, 0.5), 1e-3
NAMES = tuple(torch_model.QUANTIZERS)


def both_sides(name):
    """The same model twice: in PyTorch, and as llvq's (graphdef, params, statistics)."""
    torch.manual_seed(0)
    model = oracle.Model(name, channels=1, hidden_dims=(8,))
    torch.nn.init.normal_(model._quantizer.embedding.weight, std=0.05)  # no code is 0 everywhere
    model.to(memory_format=torch.channels_last)
    fields = tiny.config(name)
    fields["quantizer"] = {"name": name, **oracle.options(name, 16)}
    ours = factory.abstract_model(parse(fields).architecture)
    return model, (nnx.graphdef(ours), *llvq_state(model))


@pytest.mark.parametrize(
    "name", [n if n == "vq_ema" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_both_sides_take_the_same_steps(name):
    model, (graphdef, params, statistics) = both_sides(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, RATE, fused=True)
    losses = torch_model.make_losses(model.train(), VALUE_RANGE, amp=False)
    theirs = torch_model.make_train_step(losses, optimizer)
    before = jax.tree.map(np.array, params)  # the state is donated
    schedule = optax.constant_schedule(RATE)
    adam = optax.adam(schedule)
    state = train_state.TrainState(jnp.int32(0), params, statistics, adam.init(params))
    mesh = sharding.make_mesh(jax.devices()[:1])
    ours, _ = make_train_step(graphdef, Objective(default_weights()), adam, schedule, mesh)
    for seed in range(3):
        images = tiny.images(16, seed)
        state, metrics = ours(state, images)
        # Rounding of a float32 sum; measured: 1e-6.
        assert float(theirs(torch.from_numpy(images))) == pytest.approx(
            float(metrics["loss"]), rel=1e-5
        )
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        assert np.abs(new - old).max() > RATE / 2  # all have moved
    # However small a gradient is, Adam's first steps are as long as the rate; 1% of it is allowed.
    # The EMA's sums and quotients are larger than 1. Measured: 2e-6.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2 * RATE),
        (state.params, state.statistics),
        llvq_state(model),
    )


def test_both_sides_evaluate_alike_and_learn_nothing():
    model, (graphdef, params, statistics) = both_sides("vq_ema")
    state = train_state.TrainState(jnp.int32(0), params, statistics, ())
    images = tiny.images(5)
    losses = torch_model.make_losses(model.eval(), VALUE_RANGE, amp=False)
    evaluate = torch_model.make_evaluate_step(losses)
    theirs = [float(x) for x in evaluate(torch.from_numpy(images))]
    mesh = sharding.make_mesh(jax.devices()[:1])
    ours = benchmark.make_evaluate_step(graphdef, mesh)(state, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # rounding of a float32 sum
    jax.tree.map(np.testing.assert_array_equal, (params, statistics), llvq_state(model))


@pytest.mark.parametrize("dataset", settings.DATASETS)
@pytest.mark.parametrize("name", NAMES)
def test_both_sides_have_the_same_network(name, dataset):
    config = settings.get_config(dataset, name)
    with torch.device("meta"):
        model = torch_model.create(config.architecture)
    tensors = {name: np.empty(x.shape) for name, x in model.state_dict().items()}
    _, *expected = factory.split(factory.abstract_model(config.architecture))
    shapes = [
        jax.tree.map(np.shape, tree)
        for tree in (expected, list(import_torch.parameters_from_state_dict(tensors)))
    ]
    assert shapes[0] == shapes[1]


def test_mixed_precision_leaves_the_quantizer_and_the_losses_in_float32():
    torch.manual_seed(0)
    model = oracle.Model("dense_lattice", channels=1, hidden_dims=(8,))
    dtypes = []
    model._encoder[0].register_forward_hook(lambda *x: dtypes.append(x[-1].dtype))
    model._quantizer.register_forward_hook(lambda *x: dtypes.extend(y.dtype for y in x[-1]))
    images = torch.from_numpy(tiny.images(2))
    found = torch_model.make_losses(model, (-0.5, 0.5), amp=True)(images)
    assert dtypes == [torch.bfloat16, *[torch.float32] * 3]
    assert [x.dtype for x in found] == [torch.float32] * 2


def test_times_are_taken_in_turns(monkeypatch):
    now, order = 0.0, []

    def taking(name, seconds):
        def run(num_steps):
            nonlocal now
            order.append((name, num_steps))
            now += num_steps * next(seconds)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    slow = itertools.chain([1.0], itertools.count(4.0))
    runs = {"fast": taking("fast", itertools.repeat(0.25)), "slow": taking("slow", slow)}
    times = measure.interleave(runs, 3, min_seconds=1.0)
    assert times == {"fast": [0.25] * 3, "slow": [4.0, 5.0, 6.0]}
    calibration, turns = order[:2], order[2:]
    assert calibration == [("fast", 1), ("slow", 1)]
    fast, slow = ("fast", 4), ("slow", 1)
    assert turns == [fast, slow, slow, fast, fast, slow]


def test_a_call_of_several_steps_counts_as_several(monkeypatch):
    monkeypatch.setattr(measure, "interleave", lambda runs, *_: {name: [6, 9] for name in runs})
    contenders = {"one": lambda: Contender(nothing, 1), "three": lambda: Contender(nothing, 1, 3)}
    assert measure.compare(contenders, 2, 0.0)[0] == {"one": [6, 9], "three": [2, 3]}


def test_on_a_gpu_fashion_mnist_is_trained_in_calls_of_several_steps(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = benchmark._case("fashion_mnist", "vq", "train", 2, 12)
    assert "llvq bfloat16, 5 steps per call" in case.contenders
    assert case.contenders["llvq, 5 steps per call"].keywords == {"steps_per_call": 5}


@pytest.mark.slow
def test_a_contender_can_take_several_steps_per_call():
    config = settings.get_config("fashion_mnist", "vq", batch_size=2, image_size=12)
    contender = benchmark.prepare_llvq(config, "train", steps_per_call=5)
    contender.run(1)
    assert contender.steps_per_call == 5


def test_a_config_can_be_varied():
    options = {"codebook_size": 32}
    config = settings.get_config("celeba", "vq", batch_size=3, image_size=20, options=options)
    assert config.batch_size == 3
    assert config.model.image_shape == (20, 20, 3)
    assert config.quantizer.options == complete("vq", options)


PROGRAM = """
from tests.blocked import block

block("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "constriction")
from benchmarks import codebook_usage, quantizer, settings, sweep, train_step

for dataset in settings.DATASETS:
    print(settings.get_config(dataset, "vq"))
"""


def test_the_benchmarks_need_neither_tensorflow_nor_ml_collections():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = [str(settings.get_config(dataset, "vq")) for dataset in settings.DATASETS]
    assert result.stdout.splitlines() == expected


def test_memory_is_what_a_step_takes():
    x = torch.zeros(2**18)  # 1 MiB

    def run(num_steps):
        for _ in range(num_steps):
            y = x + 1  # two of them at a time
            del y
            y = x + 1
            y * 2

    # The numbers 1 and 2 become tensors, too.
    assert measure.torch_memory(run, [x]) == pytest.approx(3 * 2**20, abs=64)
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(2**18)).compile()
    assert 2 * 2**20 <= measure.compiled_memory(compiled) < 2.01 * 2**20


def too_large_for_torch():
    torch.empty(2**50).fill_(0)


def too_large_for_jax():
    jnp.zeros(2**40).block_until_ready()


def nothing(num_steps):
    pass


@pytest.mark.parametrize("prepare", [too_large_for_torch, too_large_for_jax])
def test_what_does_not_fit_is_said_and_the_others_run(prepare):
    contenders = {"llvq": lambda: Contender(nothing, 1), "PyTorch": prepare}
    seconds, ran = measure.compare(contenders, 2, 0.0)
    assert seconds["PyTorch"] is None
    assert len(seconds["llvq"]) == 2
    row = {"setting": {"K": 64}, "unit": "vectors", "amount": 1}
    row |= {"seconds": seconds, "memory_bytes": dict.fromkeys(ran, 1)}
    table = comparison.comparison_table([row])
    assert "| 64 | PyTorch | **does not fit** |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_table_has_the_median_ratio_of_pairs_and_shares_of_what_the_device_reaches():
    row = {"setting": {"K": 1024}, "unit": "images", "amount": 8}
    row["memory_bytes"] = {"llvq": 2_000_000, "PyTorch": None}
    # Ratios 2, 1 and 3; that of the medians is 1.
    row["seconds"] = {"llvq": [1.0, 2.0, 10.0], "PyTorch": [2.0, 2.0, 30.0]}
    header, _, ours, theirs = comparison.comparison_table([row]).splitlines()
    assert header.endswith("| program | ms | images/s | memory, MB | llvq's speed / this one's |")
    assert ours == "| 1,024 | llvq | 2,000 | 4 | 2 |  |"
    assert theirs == "| 1,024 | PyTorch | 2,000 | 4 |  | 2.00 (1.00 … 3.00) |"
    row["ceilings"] = {"memory": 1e9, "tf32": 1e12, "float32": 1e11}
    row["work"] = {"llvq": {"memory": 8e8, "tf32": 4e11}, "PyTorch": {}}
    header, _, ours, _ = comparison.comparison_table([row]).splitlines()
    assert "| memory, MB | of the memory's speed | of the arithmetic's |" in header
    assert ours == "| 1,024 | llvq | 2,000 | 4 | 2 | 40% | 20% |  |"


def test_ceilings_and_work_agree_with_a_product():
    reached = measure.ceilings()
    assert reached.keys() == {"memory", "float32", "tf32", "bfloat16"}
    assert all(value > 1e7 for value in reached.values())
    square = jnp.zeros((256, 256))
    work = measure.work(jax.jit(jnp.matmul).lower(square, square).compile(), "float32")
    assert work == {"memory": pytest.approx(3 * 4 * 256**2), "float32": pytest.approx(2 * 256**3)}


def test_a_processor_is_named_with_its_widest_vectors():
    one = "processor\t: {}\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx avx2 sse\n\n"
    assert sharding._processor(one.format(0) + one.format(1)) == "AMD EPYC 7B13, AVX2"
    assert sharding._processor("model name: X\nflags: avx2 avx512f") == "X, AVX-512"
    assert sharding._processor("")


def test_cases_are_kept_as_they_come_and_replaced_when_measured_again(
    tmp_path, monkeypatch, capsys
):
    options = argparse.Namespace(repeats=1, min_seconds=0.0, output=tmp_path / "benchmarks.json")
    options.resume = False
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (7.25, 1.0, 1.0))

    def record(program, *batches, prepare=lambda: Contender(nothing, 1)):
        cases = [Case({"batch": n}, n, {"llvq": prepare}) for n in batches]
        comparison.record(program, ["jax"], cases, "images", options)
        out, err = capsys.readouterr()
        assert err.startswith("other programs keep 7.2 cores busy")
        return out

    def fail():
        raise RuntimeError("an error that has nothing to do with memory")

    assert "| 2 | llvq |" in record("a.py", 1, 2)
    monkeypatch.setattr(store.sharding, "describe", lambda mesh: "another machine")
    record("b.py", 1)
    record("a.py", 2, 3)
    record("a.py", 2)
    with pytest.raises(RuntimeError, match="nothing to do"):
        record("a.py", 4, prepare=fail)
    options.resume = True
    record("a.py", 3, prepare=fail)  # it is not measured again
    with pytest.raises(RuntimeError, match="nothing to do"):
        record("a.py", 1, prepare=fail)  # it was measured on the first machine only
    rows = json.loads(options.output.read_text())
    assert [(row["program"], row["setting"]["batch"]) for row in rows] == [
        ("a.py", 1),
        ("a.py", 2),
        ("b.py", 1),
        ("a.py", 3),
        ("a.py", 2),
    ]
    page = options.output.with_suffix(".md").read_text()
    titles = re.findall(r"^## (.*?): (another machine)?", page, re.M)
    assert titles == [("a.py", ""), ("b.py", "another machine"), ("a.py", "another machine")]
    assert f"jax {jax.__version__}; load average before: 7.2\n" in page


PAGES = dict.fromkeys(
    ("accelerator", "benchmarks", "nearest_point", "start"), comparison.report
) | {
    "codec": codec_benchmark._report,
    "growth": lambda rows: growth._report(rows, "growth.png"),
    "tpu_compile": tpu_compile._report,
    "train_loop": train_loop._report,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_in_the_repository_are_of_the_rows_in_the_repository(name):
    path = ROOT / f"results/{name}.json"
    assert path.with_suffix(".md").read_text() == PAGES[name](json.loads(path.read_text()))


STEPS = "--datasets=fashion_mnist --quantizers=sparse_lattice --batch-size=2 --image-size=12"
BOTH, LATTICES = {"train", "evaluate"}, {"A2", "D4", "E8", "Leech"}
PACKAGED = {"vq", "vq_ema", "fsq", "lfq", "bsq", "simvq", "residual_vq"}
# Arguments, what varies, and its values by contender.
COMMANDS = {
    benchmark: (
        STEPS,
        "step",
        {"llvq": {*benchmark.STEPS}, "network alone": BOTH, "PyTorch": BOTH},
    ),
    quantizer: (
        "--codebook-sizes=16 --vectors=32",
        "quantizer",
        {"llvq": {*quantizers.QUANTIZERS}, "PyTorch": {*NAMES}, quantizer.PACKAGE: PACKAGED},
    ),
    nearest_point: (
        "--vectors=64",
        "lattice",
        {"llvq": LATTICES, "round": LATTICES, "product": {"Leech"}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", COMMANDS)
def test_a_command_measures_every_case(program, tmp_path, capsys):
    if program is quantizer:
        pytest.importorskip("vector_quantize_pytorch", reason="the benchmark compares with it")
    arguments, varied, expected = COMMANDS[program]
    output = tmp_path / "benchmarks.json"
    program.main([*arguments.split(), "--repeats=1", "--min-seconds=0", f"--output={output}"])
    measured = {}
    for row in json.loads(output.read_text()):
        for name, (seconds,) in row["seconds"].items():
            assert seconds > 0
            measured.setdefault(name, set()).add(row["setting"][varied])
    assert measured == expected
    assert capsys.readouterr().out.strip() in output.with_suffix(".md").read_text()


def run_alone(program, *arguments):
    """Runs a benchmark in a process with one device."""
    command = [sys.executable, ROOT / f"benchmarks/{program}.py", *arguments]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        command, env=one_device, capture_output=True, text=True, check=True
    ).stdout


def test_the_loops_share_is_that_of_the_gaps_and_of_slower_steps():
    steps, now = {}, 0.0
    for number in range(5, 64):
        after_save = 1 <= number % 20 <= 4
        steps[number] = train_loop.Span(now, now + (0.013 if after_save else 0.010))
        gap = 0.008 if number % 20 == 0 else 0.004 if number % 6 == 0 else 0.001
        now = steps[number].end + gap
    measured = train_loop.summarise(steps, log_every=30, save_every=100)
    # An ordinary gap after each step, 3 ms more every 30 steps; every 100 steps 7 ms more, and 4
    # steps that take 3 ms more.
    loop = 0.001 + 0.003 / 30 + (0.007 + 4 * 0.003) / 100
    assert measured.pop("share") == pytest.approx(loop / (0.010 + loop))
    assert measured == pytest.approx(
        {
            "step": 0.010,
            "gap": 0.001,
            "gap_after_log": 0.004,
            "gap_after_checkpoint": 0.008,
            "slower_steps_after_checkpoint": 0.012,
        }
    )


@pytest.mark.slow
def test_the_loops_command_runs(tmp_path):
    output = tmp_path / "train_loop.json"
    arguments = ("--datasets=fashion_mnist", "--num-steps=26", f"--output={output}")
    printed = run_alone("train_loop", *arguments, f"--trace-dir={tmp_path}")
    (row,) = json.loads(output.read_text())
    start = f"| fashion_mnist | 64 | {1e3 * row['step']:.2f} |"
    assert printed.splitlines()[2].startswith(start)
    assert start in output.with_suffix(".md").read_text()
    steps = train_loop.read(tmp_path / "fashion_mnist")
    assert {6, 12, 18, 20, 24} < set(steps)
    runs = [steps[number] for number in sorted(steps)]
    assert all(run.start < run.end for run in runs)
    assert all(a.end <= b.start for a, b in itertools.pairwise(runs))
    # On any machine, a step of this network takes far longer than the gap after it.
    assert 0 < row["gap"] < row["step"]
    assert row["gap"] < row["gap_after_checkpoint"]
    assert 0 < row["share"] < 0.5


@pytest.mark.slow
@real_data.needs_files
def test_the_codecs_command_runs(tmp_path):
    pytest.importorskip("zstandard", reason="the benchmark compares with it")
    output = tmp_path / "codec.json"
    arguments = ("--quantizers=sparse_lattice", "--images=20", "--repeats=1", "--min-seconds=0")
    printed = run_alone("codec", *arguments, f"--output={output}")
    rows = json.loads(output.read_text())
    for row in rows:
        start = f"| fashion_mnist/sparse_lattice | 3,920 | {row['between']} | {row['by']} |"
        assert start in printed
        assert start in output.with_suffix(".md").read_text()
        assert row["is_pinned"] == hasattr(os, "sched_setaffinity")
        assert all(row["seconds"][what][0] > 0 for what in ("encode", "decode"))
    ways = {(row["between"], row["by"]): row for row in rows}
    assert ways.pop(("codes and ids", "llvq"))["bits_per_vector"] is None
    bits = {way: row["bits_per_vector"] for way, row in ways.items()}
    ours = [bits["ids and bits", by] for by in ("llvq, order 0", "llvq, with contexts")]
    streams = [bits["codes and stream", by] for by in ("llvq, order 0", "llvq, with contexts")]
    tables = [row["cross_entropy"] for row in rows if row["cross_entropy"] is not None]
    assert ours == pytest.approx(tables, rel=0.01)  # the coder's last words are 0.3%
    np.testing.assert_allclose(np.subtract(streams, ours), 8 * 30 / 3_920)  # the header
    assert max(streams) < min(bits["ids and bits", by] for by in ("zlib, level 6", "zstd, level 3"))
    assert ours[1] < bits["ids and bits", "zstd, level 19"]


@pytest.mark.slow
def test_the_sweep_runs(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SWEEPS", {sweep.CODEBOOK_SIZE: (16,), sweep.IMAGE_SIZE: (12,)})
    sweep.main(["--repeats=1", "--min-seconds=0"])
    printed = capsys.readouterr().out
    for varied, value in ((sweep.CODEBOOK_SIZE, 16), (sweep.IMAGE_SIZE, 12)):
        for name in ("vq", "sparse_lattice"):
            assert f"| {varied} | {value} | {name} |" in printed
    # FashionMNIST's network has vectors of 64 numbers.
    assert [sweep.num_parameters(name, 16) for name in ("vq", "sparse_lattice")] == [16 * 64, 64]


def test_growth_ends_where_something_breaks(tmp_path, monkeypatch, capsys):
    measured = []

    def run_apart(step, batch_size, size, seconds):
        measured.append((step, batch_size, size))
        if size * batch_size > 512:
            return {"ended": "not enough memory"}
        row = {"seconds": [0.5], "memory_bytes": None, "peak_bytes": 3 * 10**9}
        return row | {"bytes_accessed": 4e9}

    monkeypatch.setattr(growth, "run_apart", run_apart)
    output = tmp_path / "growth.json"
    arguments = ["--steps=encode", "--batch-sizes", "1", "2", "--sizes", "1024", "256", "512"]
    for _ in range(2):  # nothing is measured twice
        growth.main([*arguments, f"--output={output}"])
    assert measured == [("encode", 1, n) for n in (256, 512, 1024)] + [
        ("encode", 2, n) for n in (256, 512)
    ]
    page = output.with_suffix(".md").read_text()
    assert "| encode | 2 | 256×256 | 4 | 0.262 |  | 3,000 | 2 |" in page
    assert "| encode | 2 | 512×512 | **not enough memory** |" in capsys.readouterr().out
    assert "| encode | 1 | 1024×1024 | **not enough memory** |" in page
    assert output.with_suffix(".png").stat().st_size > 5_000


@pytest.mark.slow
def test_growth_measures_in_a_process_of_its_own():
    row = growth.run_apart("evaluate", 2, 28, 60)
    assert len(row["seconds"]) == 3
    assert row["peak_bytes"] > row["memory_bytes"] > 0
    ended = growth.run_apart("evaluate", 2, 30, 60)["ended"]
    assert "must be a multiple of 4" in ended
    assert growth.run_apart("evaluate", 2, 28, 0) == {"ended": "took more than 0 s"}


@pytest.mark.slow
def test_the_phases_of_a_start(tmp_path):
    begin = time.monotonic()
    phases = start.measure_once("celeba", str(tmp_path))  # on random images
    assert tuple(phases) == start.PHASES
    assert all(seconds >= 0 for seconds in phases.values())
    assert phases["compilation"] > phases["data"]  # nothing was in the cache
    assert 0 < sum(phases.values()) < time.monotonic() - begin


@pytest.mark.parametrize(
    ("program", "missing", "arguments", "message"),
    [
        (train_loop, "", ["--num-steps=25"], "train_loop.py: --num-steps=25: must be at least 26"),
        (train_loop, "", [], "it cannot read traces of 8 devices of kind cpu"),
        (benchmark, "torch", [], 'train_step.py: PyTorch is not installed: pip install "torch'),
        (quantizer, "torch", [], 'quantizer.py: PyTorch is not installed: pip install "torch'),
        (quantizer, "vector_quantize_pytorch", [], "pip install vector-quantize-pytorch"),
        (quantizer, "", ["--codebook-sizes", "100"], "100 must be a power of 2"),
        (quantizer, "", ["--vectors", "0"], "--vectors: 0 must be at least 1"),
        (codec_benchmark, "zstandard", [], "codec.py: zstandard is not installed: pip install"),
        (codec_benchmark, "", ["--images", "0"], "--images: 0 must be at least 1"),
        (benchmark, "", ["--batch-size", "-1"], "--batch-size: -1 must be at least 1"),
        (
            benchmark,
            "",
            ["--datasets", "ffhq1024", "--image-size", "30"],
            "model.image_shape=(30, 30, 3): must be a mul",
        ),
        (benchmark, "", ["--min-seconds=-1"], "--min-seconds: -1.0 must be 0 or more"),
        (benchmark, "", ["--min-seconds=nan"], "--min-seconds: nan must be 0 or more"),
        (benchmark, "", ["--output=pyproject.toml"], "must end in .json"),
        (benchmark, "", ["--output=results/published.json"], "is not of this program"),
    ],
)
def test_mistakes_end_in_one_line(program, missing, arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing or None)
    with pytest.raises(SystemExit) as exit_info:
        program.main(arguments)
    assert message in exit_info.value.code
    assert "\n" not in exit_info.value.code


@pytest.mark.parametrize("bits", range(2, 25))
def test_levels_multiply_to_the_codebook_size(bits):
    levels = quantizer.fsq_levels(2**bits)
    assert math.prod(levels) == 2**bits
    assert all(4 <= level <= 8 for level in levels)  # FSQ has none of 2


@pytest.mark.parametrize("name", NAMES)
def test_the_quantizers_options_reach_both_sides(name):
    options = quantizer._options(name, 32)
    assert options.keys() == complete(name, {}).keys()
    torch_model.create_quantizer(name, 8, options)
