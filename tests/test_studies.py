"""Studies: their runs, the records of those, and the numbers on their pages."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("matplotlib", reason="pages have plots")
pytest.importorskip("scipy", reason="pages have confidence intervals")

from llvq.config import parse, to_dict
from llvq.errors import DivergenceError
from results import intervals, output_activation, pages, recorded
from results.curves import CURVES
from tests import tiny


class Run(NamedTuple):
    """A run that a test can afford."""

    directory: Path
    seed: int

    @property
    def name(self):
        return f"tiny/seed_{self.seed}"

    @property
    def record(self):
        return self.directory / f"{self.name}.json"

    def config(self):
        return parse(tiny.config("fsq", seed=self.seed))


def test_missing_runs_are_trained_once(tmp_path, monkeypatch):
    trained = []

    def train_and_evaluate(config, workdir, data):
        trained.append((config.seed, workdir))
        if config.seed == 32:
            raise DivergenceError("the loss is nan")

    monkeypatch.setattr(recorded, "load", lambda config: tiny.dataset())
    monkeypatch.setattr(recorded, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(
        recorded, "evaluate", lambda *_, **options: {"psnr": 20.0, "checkpoint": "checkpoints/6"}
    )
    good, diverging = runs = [Run(tmp_path / "records", seed) for seed in (2, 32)]
    for _ in range(2):
        recorded.train_missing(runs, tmp_path)
    assert trained == [(2, tmp_path / "tiny/seed_2"), (32, tmp_path / "tiny/seed_32")]
    records = recorded.read(runs)
    assert list(records) == runs
    assert records[good]["evaluation"] == {"psnr": 20.0}
    assert records[diverging]["diverged"] == "the loss is nan"
    assert recorded.evaluated(runs, records) == [good]
    # A record of another config does not count; a field that it lacks has its default.
    record = json.loads(good.record.read_text())
    del record["config"]["steps_per_call"]
    good.record.write_text(json.dumps(record))
    assert good in recorded.read(runs)
    record["config"]["learning_rate"] *= 2
    good.record.write_text(json.dumps(record))
    assert list(recorded.read(runs)) == [diverging]
    recorded.train_missing(runs, tmp_path)
    assert [seed for seed, _ in trained] == [2, 32, 2]


@pytest.mark.parametrize("name", ["compared", "photo_runs", "output_activation"])
def test_every_run_has_a_name_and_a_possible_config(name):
    runs = pytest.importorskip(f"results.{name}").RUNS
    assert len({run.record for run in runs}) == len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = run.config()
        assert config.seed == run.seed
        if hasattr(run, "curve"):
            assert config.quantizer.options[CURVES[run.curve].knob] == run.value
        if hasattr(run, "epochs"):
            assert config.num_epochs == run.epochs


def test_numbers_of_several_seeds():
    # The 97.5% quantile of Student's t with 2 degrees of freedom is 4.303.
    assert intervals.half_width([1, 2, 3]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert intervals.text([1, 2, 3], "+.2f") == "+2.00 ± 2.48"
    assert intervals.text([], ".2f") == "–"
    assert intervals.spread([1, 3], ".2f") == "2.00 ± 1.41"  # of a sample
    assert intervals.spread([5], ".2f") == intervals.text([5], ".2f") == "5.00"
    evaluations = [{"psnr": 1, "bits": 7}, {"psnr": 3, "bits": 7}]
    numbers = {"rate": ("bits", ".0f"), "PSNR": ("psnr", ".2f")}
    assert pages.cells(evaluations, numbers) == ["7 ± 0", "2.00 ± 1.41"]


def test_gains_are_paired_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(output_activation, "DIRECTORY", tmp_path / "output_activation")
    psnrs = {"leaky_relu": (20, 22, 24), "none": (23, 23, 26)}
    for activation, by_seed in psnrs.items():
        for seed, psnr in zip((2, 32, 432), by_seed, strict=True):
            run = output_activation.Run("vq", activation, seed, 3)
            numbers = {"reconstruction_loss": 0.5, "coded_bits_per_vector": psnr}
            recorded.keep(
                run, {"config": to_dict(run.config()), "evaluation": {"psnr": psnr, **numbers}}
            )
    output_activation.main(["--write"])
    page = (tmp_path / "output_activation.md").read_text()
    assert "PSNR is 2.0 to 2.0 dB higher" in page
    assert "(6 of 48 runs are finished)" in page
    means = "22.00 ± 4.97 | 24.00 ± 4.30 | 0.50000 ± 0.00000 | 0.50000 ± 0.00000"
    assert f"| vq | 3 | 2, 32, 432 | {means} | +2.00 ± 2.48 | +2.00 ± 2.48 |" in page
