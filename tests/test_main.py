"""The command line, as a user runs it: in a process of its own."""

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests import fuzz_targets
from tests.real_data import needs_files

tf = pytest.importorskip("tensorflow", reason="main.py reads data with TensorFlow")

ROOT = Path(__file__).resolve().parents[1]
FASHION = "--config=configs/fashion_mnist.py"
SMALL = [
    "--config.model.hidden_dims=(8,)",
    "--config.model.latent_dim=8",
    "--config.log_every_steps=4",
    "--config.eval_every_steps=8",
    "--config.checkpoint_every_steps=8",
]


def main(*arguments, timeout=300):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line(result, *words):
    """Fails with a single line on the console, which has all these words and no traceback."""
    assert result.returncode not in (0, -6, -9, -11)
    lines = [line for line in result.stderr.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0]


def events(workdir):
    """{tag: number of records} of the TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {tag: len(accumulator.Tensors(tag)) for tag in accumulator.Tags()["tensors"]}


@pytest.mark.slow
@needs_files
def test_train_resume_extend_and_evaluate_on_the_real_data(tmp_path):
    relative = os.path.relpath(tmp_path, ROOT)  # as people type it
    config = (
        f"{FASHION}:sparse_lattice",
        f"--workdir={relative}",
        "--config.batch_size=500",
        *SMALL,
    )
    first = main(*config, "--config.num_train_steps=10")
    assert first.returncode == 0, first.stderr
    assert "Starting at step 0 of 10" in first.stderr
    assert "ETA" in first.stderr
    second = main(*config, "--config.num_train_steps=16")
    assert second.returncode == 0, second.stderr
    assert "Resuming at step 10 of 16" in second.stderr

    evaluated = main(f"--workdir={relative}", "--mode=evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "ETA" in evaluated.stderr
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["step"] == 16
    assert results["num_quantized_vectors"] == 60_000 * 14 * 14
    assert {"reconstruction_loss", "psnr", "ssim", "effective_codebook_size", "perplexity"} < set(
        results
    )
    assert tf.io.decode_png((tmp_path / "reconstructions.png").read_bytes()).shape[-1] == 1

    tags = events(tmp_path)
    # Logged at 4, 8 and the end (10), then at 12 and 16; validated at 8 and 10, then at 16.
    assert tags["train/loss"] == tags["train/learning_rate"] == 5
    assert tags["validation/psnr"] == tags["validation/reconstructions"] == 3
    assert tags["validation/basis"] == 3
    assert tags["config"] == 2
    for line in first.stderr.splitlines():
        assert "orbax" not in line.lower()
        assert "oneDNN" not in line


@pytest.mark.slow
def test_what_is_compiled_is_kept_for_the_next_run(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "tests.run_main", str(tmp_path / "w"), "1", "0"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    names = [path.name for path in (tmp_path / "cache/llvq").iterdir()]
    for program in ("train_step", "uniform"):  # a large one, and one that makes the model
        assert any(program in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{FASHION}:vq", "--config.nope=1"], ["no field nope"]),
        ([f"{FASHION}:vq", "--config.model.nope=1"], ["no field nope"]),
        ([f"{FASHION}:xvq"], ["unknown quantizer 'xvq'", "vq_ema"]),
        ([f"{FASHION}:vq,longer"], ["unknown recipe 'longer'", "paper"]),
        (
            [f"{FASHION}:sparse_lattice", "--config.quantizer.name=vq"],
            ["config.quantizer.gamma is not an option of vq"],
        ),
        ([f"{FASHION}:vq", "--checkpoint=/nowhere"], ["--checkpoint", "--mode=evaluate"]),
        (["--config=configs/default.py"], ["config.model.image_shape=(0, 0, 0)"]),
        (["--config=configs/imagenet.py"], ["configs/imagenet.py", "No such file"]),
        ([f"{FASHION}:vq", "--config.batch_size=many"], ["config.batch_size", "many"]),
        ([f"{FASHION}:vq", "--config.batch_size=-64"], ["config.batch_size=-64"]),
        ([f"{FASHION}:vq", "--config.num_train_steps=-1"], ["config.num_train_steps=-1"]),
        ([f"{FASHION}:vq", "--config.model.hidden_dims.0=8"], ["model.hidden_dims.0"]),
        ([f"{FASHION}:vq", "--config.batch_size.x=8"], ["batch_size.x"]),
        (["--config=README.md"], ["README.md"]),
        ([f"{FASHION}:vq", "--mode=play"], ["mode", "train|evaluate"]),
        ([f"{FASHION}:vq", "--modus=train"], ["modus"]),
        ([f"{FASHION}:vq", "train"], ["unexpected argument 'train'"]),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome, line = fuzz_targets.parse([*arguments, "--workdir=/nowhere"])
    assert outcome == "refused"
    assert "\n" not in line
    assert line.startswith("main.py: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{FASHION}:vq", "--config.nope=1"], ["no field nope"]),
        ([f"{FASHION}:vq", "--config.dataset.manual_dir=/nowhere"], ["manual_dir=/nowhere"]),
        pytest.param(
            [f"{FASHION}:vq", "--mode=evaluate"],
            ["no checkpoint in", "train first"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_users_mistake_is_one_line(arguments, words, tmp_path):
    assert_one_line(main(*arguments, f"--workdir={tmp_path}"), *words)
    assert not list(tmp_path.iterdir())


CONFIG = """
import math

from configs import default


def get_config(argument):
    config = default.get_config(argument)
    config.batch_size = {}
    return config
"""


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("math.ceiling(3)", AttributeError),
        ("maths.ceil(3)", NameError),
        ("open('/nowhere/x')", FileNotFoundError),
        ("'many'", TypeError),  # ConfigDict wants a number
        ("default.get_config(3).batch_size", AttributeError),
    ],
)
def test_a_mistake_in_a_config_file_keeps_its_traceback(mistake, error, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.replace("{}", mistake, 1))
    with pytest.raises(Exception) as raised:  # noqa: PT011 (config_flags may have changed its type)
        fuzz_targets.parse([f"--config={path}:vq", "--workdir=/nowhere"])
    shown = "".join(traceback.format_exception(raised.value))
    assert error.__name__ in shown
    assert str(path) in shown


def test_a_file_that_is_not_python_is_one_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.replace("{}", "3 +", 1))
    outcome, line = fuzz_targets.parse([f"--config={path}:vq", "--workdir=/nowhere"])
    assert outcome == "refused"
    assert re.fullmatch(rf"main.py: --config: {path}, line 9: invalid syntax", line)


def test_evaluation_makes_nothing_where_there_is_no_checkpoint(tmp_path):
    workdir = tmp_path / "mistyped"
    result = main(f"--workdir={workdir}", "--mode=evaluate")
    assert_one_line(result, "no checkpoint in", "mistyped")
    assert not workdir.exists()


def test_missing_flags_are_named():
    assert_one_line(main(f"{FASHION}:vq"), "--workdir is missing")
    assert_one_line(main("--workdir=/tmp"), "--config is missing")


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_an_unwritable_workdir_is_one_line(mode, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert_one_line(
        main(f"{FASHION}:vq", f"--workdir={blocked}/run", f"--mode={mode}"), f"{blocked}/run"
    )
    assert blocked.read_text() == "in the way"


@pytest.mark.slow
@needs_files
def test_an_image_shape_that_is_not_the_data_sets_is_one_line(tmp_path):
    arguments = [f"{FASHION}:vq", f"--workdir={tmp_path}", "--config.model.image_shape=(32, 32, 1)"]
    assert_one_line(main(*arguments), "config.model.image_shape", "(28, 28, 1)")


@pytest.mark.slow
@needs_files
def test_divergence_is_one_line(tmp_path):
    arguments = [f"{FASHION}:vq", f"--workdir={tmp_path}", *SMALL, "--config.learning_rate=1e30"]
    assert_one_line(main(*arguments), "step", "no checkpoint was saved before it")


@pytest.mark.slow
def test_float64_switches_double_precision_on(tmp_path):
    arguments = [f"{FASHION}:vq", f"--workdir={tmp_path}", "--config.compute_dtype=float64"]
    result = main(*arguments, "--mode=evaluate")
    assert_one_line(result, "no checkpoint")  # and no complaint about x64


def test_help_explains_itself():
    result = main("--help")
    assert "The config argument names the quantizer" in result.stdout
    assert "--workdir" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@needs_files
def test_a_run_that_no_machine_has_the_memory_for_is_one_line(tmp_path):
    sizes = ["--config.quantizer.codebook_size=16777216", "--config.model.latent_dim=65536"]
    result = main(f"{FASHION}:vq", f"--workdir={tmp_path}", *sizes)  # 4.4 TB of codebook
    assert_one_line(result, "not enough memory", "--config.quantizer")


@pytest.mark.parametrize("form", ["config", "to_dict(config)", "ConfigDict(to_dict(config))"])
def test_a_config_file_may_return_any_form(form, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "from llvq.config import make_config, to_dict\n"
        "def get_config(argument):\n"
        "    config = make_config(argument, image_shape=(28, 28, 1))\n"
        f"    return {form}\n"
    )
    outcome, config = fuzz_targets.parse([f"--config={path}:vq", "--workdir=/nowhere"])
    assert outcome == "done", config
    assert config["model"]["image_shape"] == [28, 28, 1]
