"""The comparison of quantizers: its runs, and its figures from records."""

import pytest

pytest.importorskip("bjontegaard", reason="the command computes delta rates with it")

from llvq.config import to_dict
from results import compare, compared, recorded
from results.curves import CURVES


def write_records(factors):
    """Records of curves at equal PSNR, whose bits are a multiple of the baseline's."""
    for run in compared.FIRST:
        place = CURVES[run.curve].values.index(run.value)
        bits = factors.get(run.curve, 1.0) * (1.0, 2.0, 3.0, 4.0)[place]
        evaluation = {
            "coded_bits_per_pixel": bits / 4,
            "coded_bits_per_vector": bits,
            "context_coded_bits_per_vector": bits / 2,
            "reconstruction_loss": 0.01 / (place + 1),
            "psnr": 20.0 + place,
            "effective_codebook_size": 3,
            "rate": bits,
            "density_coded_bits_per_vector": bits,
            "active_dimensions": 7.0,
            "second_moment": 0.07,
        }
        recorded.keep(run, {"config": to_dict(run.config()), "evaluation": evaluation})


def test_delta_rates_and_what_follows(tmp_path, monkeypatch):
    for module in (compare, compared):
        monkeypatch.setattr(module, "DIRECTORY", tmp_path / "compare")
    write_records({"fsq": 0.9, "bsq": 1.1, "e8_lattice": 0.8})
    records = recorded.read(compared.FIRST)
    assert compared.bd_rate("fsq", records) == pytest.approx(-10.0)
    assert compared.bd_rate("bsq", records) == pytest.approx(10.0)
    # A point that takes more bits for less does not count.
    worst = max(
        (run for run in records if run.curve == "fsq"), key=lambda r: compared.rate(records[r])
    )
    falling = records[worst]["evaluation"] | {"psnr": 21.0}
    found = compared.bd_rate("fsq", {**records, worst: {"evaluation": falling}})
    assert found == pytest.approx(-10.0, abs=0.5)  # three points are interpolated otherwise
    further = compared.further(records)
    of_seeds = {run.curve for run in further if run.epochs == 3}
    assert of_seeds >= {"fsq", "sparse_lattice", "e8_lattice"}
    assert len(of_seeds) == 6
    assert {run.curve for run in further if run.epochs == 10} == {"vq", "fsq", "e8_lattice"}
    # The baseline has 21 dB at 0.5 bits and 22 at 0.75.
    for bits, dbs, least, most in ((0.5, 21.3, 0.3, 0.3), (0.6, 22.0, 0.0, 1.0)):
        placed = {"evaluation": falling | {"psnr": dbs, "coded_bits_per_pixel": bits}}
        found = compared.gain(worst, {**records, worst: placed})
        assert least - 1e-9 <= found <= most + 1e-9
    beyond = {"evaluation": falling | {"coded_bits_per_pixel": 1.1}}
    assert compared.gain(worst, {**records, worst: beyond}) is None
    seeds = [run for run in further if run.curve == "fsq" and run.epochs == 3]
    for run, error in zip(seeds, (0.0035, 0.0045), strict=True):
        evaluation = records[worst]["evaluation"] | {"reconstruction_loss": error}
        records[run] = {**records[worst], "evaluation": evaluation}
    compare.write(records)
    page = (tmp_path / "compare.md").read_text()
    assert "| `fsq` | -10.0% |" in page
    assert "| `bsq` | +10.0% |" in page
    gain = f"{compared.gain(worst, records):.2f}"
    cells = f"2, 32, 432 | 3.60 ± 0.00 | 0.00350 ± 0.00100 | 23.00 ± 0.00 | 3 ± 0 | {gain} ± 0.00"
    assert f"| `fsq` | levels (8, 8, 8, 6, 5) | {cells} |" in page
    # λ, seed, epochs, three rates, dimensions, bits per dimension, second moments: 1.6 / 7 = 0.23.
    cells = "0.0007 | 2 | 3 | 1.600 | 1.600 | 1.600 | 7.0 of 8 | 0.23 | 0.0700 | 0.0717"
    assert f"| `e8_lattice` | {cells} |" in page
    # A run that diverged is finished, and has no evaluation.
    run = compared.FIRST[0]
    without = {**records, run: {"config": records[run]["config"], "diverged": "loss is nan"}}
    assert len(compared.further(without)) == len(further)
    assert compared.bd_rate(run.curve, without) is not None
    compare.write(without)
    del without[run]
    assert compared.further(without) == []
