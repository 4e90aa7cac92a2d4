"""benchmarks/tpu_compile.py: the real compiler's figures of one small step, against hand counts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import tpu_compile

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/tpu_compile.py"

# FashionMNIST's network with the sparse lattice.
NUM_PARAMETERS = 244_033


def multiplications_of_an_image():
    """The multiplications of FashionMNIST's forward pass, for taps inside the image only."""
    # Pairs of an output position and a tap that meet inside the image, along one axis. A kernel of
    # size 3 on 14 positions misses one tap at either end; so does one of size 4, stride 2, on 28.
    inside_3, inside_4 = 3 * 14 - 2, 4 * 14 - 2
    conv3x3 = inside_3**2 * 64 * 64
    conv1x1 = 14**2 * 64 * 64
    first = last = inside_4**2 * 64
    mix, blocks, project = conv3x3, 2 * (conv3x3 + conv1x1), conv1x1
    return (first + mix + blocks + project) + (mix + blocks + last), first


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed (pip install "jax[tpu]")',
)
def test_a_training_step_on_four_chips(tmp_path):
    output = tmp_path / "compiled.json"
    command = [sys.executable, SCRIPT, "--datasets", "fashion_mnist", "--steps", "train"]
    command += ["--quantizers", "sparse_lattice", "--topologies", "v5e:2x2"]
    command += ["--batch-size", "32", f"--output={output}"]

    def run():
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    first = run()
    one_chip, four_chips = json.loads(output.read_text())
    assert [one_chip["topology"], four_chips["topology"]] == ["v5e:1x1", "v5e:2x2"]
    assert [one_chip["batch_size"], four_chips["batch_size"]] == [8, 32]

    # The gradients of all parameters and the sums of three losses, in float32, are summed once, in
    # any number of all-reduces.
    assert one_chip["collectives"] == {}
    assert set(four_chips["collectives"]) == {"all-reduce"}
    assert four_chips["collectives"]["all-reduce"]["bytes"] == 4 * (NUM_PARAMETERS + 3)

    # A step multiplies in the forward pass, for the gradient of each layer's input (except the
    # images), and for the gradient of its kernel. Activations and losses add some 15 operations to
    # each output of a layer, most of which are sums of 3×3×64 products; 3% allow for 25 operations.
    forward, first_layer = multiplications_of_an_image()
    flops = 8 * 2 * (3 * forward - first_layer)
    adam = 20 * NUM_PARAMETERS
    for row in (one_chip, four_chips):
        assert flops <= row["flops"] <= 1.03 * flops + adam
        assert row["fits"]
        # At least the parameters and Adam's moments are read and written.
        assert row["bytes_accessed"] > 2 * 3 * 4 * NUM_PARAMETERS
        assert row["memory_bytes"] > 3 * 4 * NUM_PARAMETERS
        # At 197 TFLOP/s, a v5e chip does 131,072 operations per cycle.
        assert row["cycles"] > row["flops"] / 131_072
    assert "1 all-reduce, 976,144 B" in first.stdout

    second = run()
    assert second.stdout == first.stdout
    assert second.stderr == ""  # so nothing was compiled again


HLO = """
  %all-reduce.1 = (f32[64]{0:T(128)S(1)}, bf16[3,3,64,64]{3,2,1,0:T(8,128)}, /*index=2*/f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=1
  %get-tuple-element.1 = f32[64]{0:T(128)S(1)} get-tuple-element(%all-reduce.1), index=0
  %all-gather-start = (pred[8]{0}, pred[64]{0}) all-gather-start(%d), dimensions={0}
  %all-gather-done = pred[64]{0} all-gather-done(%all-gather-start)
  ROOT %all-reduce.2 = s32[2,4]{1,0} all-reduce(%all-gather-done), to_apply=%add
  %fusion.1 = f32[8]{0} fusion(%e), backend_config={"estimated_cycles":"1200","x":"1"}
  %fusion.2 = f32[8]{0} fusion(%f), backend_config={"estimated_cycles":"34"}
"""  # noqa: E501


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert tpu_compile.count_collectives(HLO) == {
        "all-reduce": {"count": 2, "bytes": 4 * 64 + 2 * 9 * 64 * 64 + 4 + 4 * 8},
        "all-gather": {"count": 1, "bytes": 64},
    }


def test_cycles_are_added_up():
    assert tpu_compile.count_cycles(HLO) == 1234


def row(**figures):
    defaults = {
        "dataset": "ffhq1024",
        "quantizer": "vq",
        "step": "train",
        "topology": "v5e:2x4",
        "batch_size": 32,
        "compute_dtype": "float32",
        "compiler": "libtpu 1",
        "fits": True,
        "memory_bytes": 3e9,
        "bytes_accessed": 8.19e9,
        "flops": 1.97e11,
        "cycles": 5e6,
        "memory_seconds": 0.01,
        "arithmetic_seconds": 0.001,
        "collective_seconds": 0.0,
        "collectives": {},
        "compile_seconds": 1.0,
    }
    return defaults | figures


def cells(table, topology):
    (line,) = (line for line in table.splitlines() if topology in line)
    return dict(zip(tpu_compile._COLUMNS, line.strip("| ").split(" | "), strict=False))


def test_the_table_compares_a_slice_with_one_chip_that_has_as_many_images():
    rows = [
        row(topology="v5e:1x1", batch_size=4),
        row(topology="v5e:1x1", batch_size=4, quantizer="vq_ema", memory_seconds=1.0),
        row(
            memory_seconds=0.011,
            collective_seconds=0.0015,
            collectives={"all-reduce": {"count": 1, "bytes": 1000}},
        ),
    ]
    shown = cells(tpu_compile.table(rows), "v5e:2x4")
    assert shown["images per chip"] == "4"
    assert shown["images/s per chip"] == "320"  # 4 / 12.5 ms
    assert shown["efficiency"] == "80.0%"
    assert shown["collectives"] == "1 all-reduce, 1,000 B"


def test_the_table_says_what_does_not_fit():
    rows = [row(topology="v5e:1x1", fits=False, memory_bytes=20.04e9)]
    assert cells(tpu_compile.table(rows), "v5e:1x1")["memory, GB"] == "**20 of 16: does not fit**"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topologies", "v9:2x4"], "there is no 'v9:2x4'; known are v4:… up to 12x16x16, v5e"),
        (["--topologies", "v5e:2x4x1"], "there is no 'v5e:2x4x1'"),
        (["--topologies", "v5e:32x16"], "there is no 'v5e:32x16'"),
        (["--topologies", "v5p"], "there is no 'v5p'"),
        (["--output", "no/such/file.json"], "there is no directory no/such"),
        (["--output", "pyproject.toml"], "--output=pyproject.toml: must end in .json"),
        (["--output", "results/published.json"], "exists and is not of this program"),
        (["--batch-size", "9"], "v5e:2x4: batch_size=9 does not divide by the 8 devices"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tpu_compile.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tpu_compile.metadata, "version", lambda name: "1")
    monkeypatch.setattr(tpu_compile, "get_devices", lambda topology: jax.devices())  # eight
    with pytest.raises(SystemExit) as exit_info:
        tpu_compile.main(arguments)
    assert message in exit_info.value.code
    assert "\n" not in exit_info.value.code


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tpu_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'tpu_compile.py: .* pip install "jax\[tpu\]"'):
        tpu_compile.main([])
