"""From finished workdirs to results/README.md."""

import dataclasses
import json
import os
import re
import shutil
import types

import numpy as np
import pytest

pytest.importorskip("tensorboard", reason="collecting reads TensorBoard's files")
pytest.importorskip("matplotlib", reason="collecting draws plots")

from clu import metric_writers
from PIL import Image

from configs import fashion_mnist
from llvq.checkpointing import from_saved
from llvq.config import RECIPES, parse, to_dict
from llvq.data import ArrayDataset
from llvq.errors import UserError
from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate
from results import collect, report, summary


def tiny(quantizer):
    """A recipe that a test can afford."""
    del quantizer
    return {"num_train_steps": 4}


class Recorder(metric_writers.SummaryWriter):
    """TensorBoard's writer, which also records the training losses."""

    def __init__(self, directory):
        super().__init__(directory)
        self.losses = {}

    def write_scalars(self, step, scalars):
        if "train/reconstruction_loss" in scalars:
            self.losses[step] = scalars["train/reconstruction_loss"]
        super().write_scalars(step, scalars)


def train(workdir, seed, num_train_steps=4):
    config = fashion_mnist.get_config("sparse_lattice,tiny")
    config.seed = seed
    config.log_every_steps = 2
    config.num_train_steps = num_train_steps
    images = np.random.default_rng(seed).integers(0, 256, (70, 28, 28, 1)).astype(np.uint8)
    data = ArrayDataset(train=images, validation=images[:9], test=images[:20])
    recorder = Recorder(str(workdir))
    train_and_evaluate(config, workdir, data, make_writer=lambda: recorder)
    return recorder.losses, evaluate(workdir, data)


@pytest.mark.slow
def test_runs_become_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setattr(report, "DIRECTORY", tmp_path / "results")
    (tmp_path / "results").mkdir()
    published = {"source": "", "fashion_mnist": {"sparse_lattice": {"mse": 0.25}}}
    (tmp_path / "results/published.json").write_text(json.dumps(published))
    runs = {seed: train(tmp_path / f"runs/seed_{seed}", seed) for seed in (2, 10)}
    wrong = {
        "empty": "no checkpoint",
        "foreign": "does not hold an evaluation of",
        "torn": "does not hold an evaluation of",
        "unfinished": "it is at step 4 of 6",
        "of no recipe": "num_train_steps is 6",
    }
    for name in wrong:
        if name == "empty":
            (tmp_path / "runs/empty").mkdir()
        else:
            shutil.copytree(tmp_path / "runs/seed_2", tmp_path / "runs" / name)
        report_file = tmp_path / "runs" / name / "evaluation.json"
        evaluation = json.loads(report_file.read_text()) if report_file.exists() else {}
        if name == "foreign":
            evaluation["checkpoint"] = str(tmp_path / "runs/seed_10/checkpoints/4")
        if name == "unfinished":
            evaluation["num_train_steps"] = 6
        if name == "of no recipe":
            saved = next((tmp_path / "runs" / name).glob("checkpoints/4/config/metadata"))
            fields = json.loads(saved.read_text())
            saved.write_text(json.dumps({**fields, "num_train_steps": 6}))
            shutil.rmtree(saved.parents[1] / "digests")  # otherwise it would be damage
        report_file.write_text(json.dumps(evaluation)[: 30 if name == "torn" else None])

    collect.main([str(tmp_path / "runs"), "--machine=an abacus"])

    output = capsys.readouterr().out
    for name, words in wrong.items():
        (line,) = (line for line in output.splitlines() if f"runs/{name}: " in line)
        assert "left out" in line
        assert words in line
    kept = report.read_runs(tmp_path / "results")["fashion_mnist", "tiny"]["sparse_lattice"]
    for run, (seed, (losses, evaluation)) in zip(kept, runs.items(), strict=True):
        assert run["seed"] == seed
        assert run["quantizer_parameters"] == 64
        assert run["machine"].startswith(f"{os.cpu_count()} CPU cores (")  # as the run recorded
        left_out = {"checkpoint", "num_train_steps"}
        assert run["evaluation"] == {k: v for k, v in evaluation.items() if k not in left_out}
        curve = dict(map(tuple, run["curves"]["train/reconstruction_loss"]))
        assert curve == pytest.approx(losses, rel=1e-6)  # TensorBoard keeps float32
    text = (tmp_path / "results/README.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `sparse_lattice` |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]

    def both(name, digits):
        values = [evaluation[name] for _, evaluation in runs.values()]
        return f"{np.mean(values):{digits}} ± {np.std(values, ddof=1):{digits}}"

    rates = [run["training_images_per_second"] for run in kept]
    assert cells == [
        "`sparse_lattice`",
        "2, 10",
        f"{both('reconstruction_loss', '.5f')} (0.25000)",
        both("psnr", ".2f"),
        both("ssim", ".3f"),
        both("effective_codebook_size", ",.0f"),
        f"{79 * 14 * 14:,}",
        both("coded_bits_per_vector", ".3f"),
        both("coded_bits_per_vector_with_tables", ".3f"),
        both("context_coded_bits_per_vector", ".3f"),
        both("coded_bits_per_pixel", ".3f"),
        both("plug_in_entropy_bits_per_vector", ".3f"),
        "64",
        f"{np.mean(rates):.0f} ± {np.std(rates, ddof=1):.0f}",
    ]
    assert "./run.sh --recipe=tiny --seeds=2,10 fashion_mnist sparse_lattice" in text
    for name in ("training.png", "sparse_lattice/seed_2.png"):
        path = f"runs/fashion_mnist/tiny/{name}"
        assert f"({path})" in text
        with Image.open(tmp_path / "results" / path) as picture:
            picture.verify()


def test_a_run_that_follows_no_recipe_is_named():
    for recipe in ("paper", "standard"):
        config = parse(fashion_mnist.get_config(f"vq,{recipe}"))
        assert collect.recipe_of(config) == recipe
    config = dataclasses.replace(config, seed=5, log_every_steps=1)
    config = dataclasses.replace(
        config, dataset=dataclasses.replace(config.dataset, data_dir="elsewhere")
    )
    assert collect.recipe_of(config) == "standard"
    with pytest.raises(UserError, match=r"no recipe: num_train_steps is 200"):
        collect.recipe_of(dataclasses.replace(config, num_train_steps=200))


def test_a_run_of_an_older_version_follows_its_recipe():
    config = to_dict(parse(fashion_mnist.get_config("vq_ema,paper")))
    for name in ("steps_per_call", "init_from", "stop_on_failed_save", "task", "loss"):
        del config[name]
    del config["quantizer"]["commitment_cost"], config["model"]["output_activation"]
    assert collect.recipe_of(from_saved(config)) == "paper"
    config["quantizer"]["decay"] = 0.9
    with pytest.raises(UserError, match=r"no recipe: quantizer.decay is 0.9"):
        collect.recipe_of(from_saved(config))


def test_the_summary_has_a_row_for_each_run(tmp_path, capsys, monkeypatch):
    figures = {
        "split": "test",
        "reconstruction_loss": 0.0123456,
        "psnr": 20.123,
        "ssim": 0.98765,
        "effective_codebook_size": 1234,
        "effective_codebook_size_is_exact": True,
        "coded_bits_per_vector": 5.678,
    }
    estimated = {"effective_codebook_size": 2**25, "effective_codebook_size_is_exact": False}
    older = ("psnr", "coded_bits_per_vector")  # an evaluation from before these were measured
    workdirs = [tmp_path / f"fashion_mnist/standard/vq/seed_{seed}" for seed in (2, 32, 432)]
    without = {name: value for name, value in figures.items() if name not in older}
    evaluations = figures, figures | estimated, without
    for workdir, evaluation in zip(workdirs, evaluations, strict=True):
        workdir.mkdir(parents=True)
        evaluation = {**evaluation, "checkpoint": "checkpoints/860"}
        (workdir / "evaluation.json").write_text(json.dumps(evaluation))

    def load(workdir):
        return types.SimpleNamespace(path=workdir / "checkpoints/860")

    monkeypatch.setattr(summary.checkpointing, "load", load)
    summary.main(list(map(str, workdirs)))
    lines = [re.sub(r" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    header, _, exact, estimate, old, *rest = lines
    assert header == (
        "| data set | recipe | quantizer | seed | split | MSE | PSNR | SSIM | codes in use "
        "| coded bits per vector |"
    )
    start = "| fashion_mnist | standard | vq | {} | test | 0.01235 | 20.12 | 0.988 | {} | 5.678 |"
    assert exact == start.format(2, "1,234")
    assert estimate == start.format(32, "≈ 33,554,432")
    assert old == "| fashion_mnist | standard | vq | 432 | test | 0.01235 | | 0.988 | 1,234 | |"
    assert [line.strip() for line in rest[3:6]] == list(map(str, workdirs))
    assert rest[-1].endswith(f"--logdir={tmp_path / 'fashion_mnist/standard/vq'}")


@pytest.mark.parametrize(
    ("workdir", "message"),
    [("runs", "must end in DATA SET"), ("celeba/standard/vq/seed_0", "no checkpoint in")],
)
def test_a_run_that_cannot_be_summarised_is_named(workdir, message, tmp_path):
    with pytest.raises(SystemExit, match=rf"results.summary: .*{message}"):
        summary.main([str(tmp_path / workdir)])


def test_an_estimated_codebook_size_is_shown_with_its_error(tmp_path):
    (tmp_path / "published.json").write_text('{"source": ""}')
    shutil.copytree(report.DIRECTORY / "runs", tmp_path / "runs")
    path = tmp_path / "runs/fashion_mnist/paper/vq/seed_2.json"
    run = json.loads(path.read_text())
    run["evaluation"] |= {
        "effective_codebook_size": 20_000_000,
        "effective_codebook_size_is_exact": False,
        "effective_codebook_size_relative_error": 0.00031,
    }
    for other in path.parent.glob("seed_*.json"):
        other.unlink()
    path.write_text(json.dumps(run))
    report.write(tmp_path)
    assert "| ≈ 20,000,000, each within 0.03% |" in (tmp_path / "README.md").read_text()


def test_the_readme_in_the_repository_is_of_the_runs_in_the_repository(tmp_path):
    shutil.copytree(report.DIRECTORY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").unlink()
    report.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (report.DIRECTORY / "README.md").read_text()
