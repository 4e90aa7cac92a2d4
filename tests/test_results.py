"""From finished workdirs to results/README.md."""

import json
import statistics

import numpy as np
import pytest

pytest.importorskip("tensorboard", reason="collecting reads TensorBoard's files")
pytest.importorskip("matplotlib", reason="collecting draws plots")

from clu import metric_writers
from PIL import Image

from configs import default, fashion_mnist
from llvq.data import ArrayDataset
from llvq.errors import UserError
from llvq.evaluate import evaluate
from llvq.train import train_and_evaluate
from results import collect, report


def tiny(config):
    """A recipe that a test can afford."""
    config.num_train_steps = 4
    config.num_epochs = 1
    config.schedule = "constant"
    config.model.latent_dim = 4
    config.model.num_residual_blocks = 1


class Recorder(metric_writers.SummaryWriter):
    """TensorBoard's writer, which remembers the training losses that it was given."""

    def __init__(self, directory):
        super().__init__(directory)
        self.losses = {}

    def write_scalars(self, step, scalars):
        if "train/reconstruction_loss" in scalars:
            self.losses[step] = scalars["train/reconstruction_loss"]
        super().write_scalars(step, scalars)


def train(workdir, seed):
    config = fashion_mnist.get_config("sparse_lattice,tiny")
    config.seed = seed
    config.batch_size = 64
    config.log_every_steps = 2
    images = np.random.default_rng(seed).integers(0, 256, (70, 28, 28, 1)).astype(np.uint8)
    data = ArrayDataset(train=images, validation=images[:9], test=images[:20])
    recorder = Recorder(str(workdir))
    train_and_evaluate(config, workdir, data, make_writer=lambda: recorder)
    return recorder.losses, evaluate(config, workdir, data)


def test_runs_become_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(default.RECIPES, "tiny", tiny)
    monkeypatch.setattr(report, "DIRECTORY", tmp_path / "results")
    (tmp_path / "results").mkdir()
    published = {"source": "", "fashion_mnist": {"sparse_lattice": {"reconstruction_loss": 0.25}}}
    (tmp_path / "results/published.json").write_text(json.dumps(published))
    runs = {seed: train(tmp_path / f"runs/seed_{seed}", seed) for seed in (2, 10)}
    unfinished = tmp_path / "runs/other"
    unfinished.mkdir()
    (unfinished / "evaluation.json").write_text("{}")

    collect.main([str(tmp_path / "runs"), "--machine=an abacus"])

    assert f"{unfinished}: left out, no checkpoint" in capsys.readouterr().out
    kept = report.read_runs(tmp_path / "results")["fashion_mnist", "tiny"]["sparse_lattice"]
    for run, (seed, (losses, evaluation)) in zip(kept, runs.items(), strict=True):
        assert run["seed"] == seed
        assert run["quantizer_parameters"] == 4
        assert run["evaluation"] == {k: v for k, v in evaluation.items() if k != "checkpoint"}
        curve = dict(map(tuple, run["curves"]["train/reconstruction_loss"]))
        assert curve == pytest.approx(losses, rel=1e-6)  # TensorBoard keeps float32
    text = (tmp_path / "results/README.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `sparse_lattice` |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    errors = [evaluation["reconstruction_loss"] for _, evaluation in runs.values()]
    mean, deviation = statistics.mean(errors), statistics.stdev(errors)
    assert cells[1] == "2, 10"
    assert cells[2] == f"{mean:.5f} ± {deviation:.5f} (0.25000)"
    assert cells[6] == f"{79 * 14 * 14:,}"
    assert "an abacus" in text
    for name in ("training.png", "sparse_lattice/reconstructions.png"):
        path = f"runs/fashion_mnist/tiny/{name}"
        assert f"({path})" in text
        with Image.open(tmp_path / "results" / path) as picture:
            picture.verify()


def test_a_run_that_follows_no_recipe_is_named():
    config = fashion_mnist.get_config("vq")
    assert collect.recipe_of(config) == "paper"
    config.seed, config.log_every_steps, config.dataset.data_dir = 5, 1, "elsewhere"
    assert collect.recipe_of(config) == "paper"
    config.num_train_steps = 200
    with pytest.raises(UserError, match=r"no recipe: num_train_steps is 200"):
        collect.recipe_of(config)


def test_what_was_collected_is_what_the_readme_shows():
    """The table in the repository is of the runs in the repository."""
    text = (report.DIRECTORY / "README.md").read_text()
    for (dataset, recipe), runs in report.read_runs(report.DIRECTORY).items():
        assert f"## {dataset}, recipe `{recipe}`" in text
        for quantizer, of_quantizer in runs.items():
            errors = [run["evaluation"]["reconstruction_loss"] for run in of_quantizer]
            assert f"| `{quantizer}` | {', '.join(str(r['seed']) for r in of_quantizer)} |" in text
            assert f"{statistics.mean(errors):.5f}" in text
