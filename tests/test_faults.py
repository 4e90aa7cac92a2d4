"""What a run survives: the cases of tests/faults.py, each as its command line runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = ("kills", "damage", "full_disk", "read_only", "clock", "removed")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


MARKS = dict.fromkeys(("clock", "removed"), pytest.mark.long)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=MARKS.get(case, pytest.mark.slow)) for case in CASES]
)
def test_a_run_survives(case):
    ended = run(case, "--kills=6", "--flips=1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = ended.stdout.splitlines()[2:]
    assert rows
    if "skipped: " in rows[0]:
        pytest.skip(rows[0])


def test_the_cases_are_all_there_are():
    unknown = run("none")
    assert unknown.returncode == 2
    assert f"choose from {', '.join(CASES)}\n" in unknown.stderr
