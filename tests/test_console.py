"""What a person sees, in a terminal and in a file."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from llvq.runtime import console
from tests.groups import ROOT

_TRAIN = """
import logging as python_logging, time
from absl import logging
from llvq.runtime import console
python_logging.basicConfig()  # a library's
console._EVERY_SECONDS = 0.3
console.set_up()
with console.Progress(12, "training", 2) as report:
    for step in range(3, 13):
        time.sleep(1.5 if step == 3 else 0.1)  # the first step compiles
        report(step, loss=None if step == 3 else 0.5 / step)
        if step == 7:
            logging.info("a line in between")
            with console.Progress(3, "measuring") as measured:
                for batch in range(1, 4):
                    measured(batch)
    time.sleep(0.1)
"""


def run(script, stderr):
    environment = {name: x for name, x in os.environ.items() if not name.startswith("TQDM_")}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**environment, "JAX_PLATFORMS": "cpu"},
    )


def read_terminal(script, num_columns):
    """All that a program writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, num_columns))
    process = run(script, theirs)
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 1 << 16):
            chunks.append(chunk)
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def screen(text):
    """The lines that are left on a terminal, of what was written to it."""
    lines, row, column = [""], 0, 0
    for piece in re.split(r"(\r|\n|\x1b\[A|\x1b\[K)", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, column
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[A":
            row -= 1
        elif piece == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_has_one_bar_that_log_lines_do_not_tear():
    written = read_terminal(_TRAIN, 100)
    lines = screen(written)
    assert len(lines) == 2, lines
    assert re.fullmatch(r"\d\d:\d\d:\d\d a line in between", lines[0])
    assert re.match(r"training: 100%\|█+\| 12/12 \[.*step/s, loss 0.04167\]", lines[1])
    # The first step takes 1.5 s and the others 0.1 s: 5 to 10 steps/s without it, 4 with it.
    assert float(re.search(r"([\d.]+)step/s", lines[1])[1]) > 5
    assert "ETA" not in written
    assert "measuring" in written


def read_pipe(script):
    _, errors = run(script, subprocess.PIPE).communicate()
    return errors.decode()


@pytest.mark.parametrize("read", [read_pipe, lambda script: read_terminal(script, 0)])
def test_a_file_or_a_terminal_of_unknown_width_has_plain_lines(read):
    text = read(_TRAIN).replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]
    training = [line for line in lines if line.startswith("training: ")]
    pattern = r"training: (\d+)/12 \((\d+)%\), ([\d.]+) steps/s, ETA 0m0[01]s, loss ([\d.]+)"
    progress = [re.fullmatch(pattern, line).groups() for line in training]
    assert 2 <= len(progress) <= 5
    done, percent, rate, loss = progress[-1]
    assert (done, percent, loss) == ("12", "100", "0.04167")
    assert 5 < float(rate) <= 10.1
    assert lines.index("a line in between") < len(lines) - 1
    assert any(line.startswith("measuring: 3/3 (100%)") for line in lines)
    assert len(lines) == len(progress) + 2


def test_only_the_first_process_shows_progress(monkeypatch, caplog):
    caplog.set_level("INFO", logger="absl")
    monkeypatch.setattr(console, "_EVERY_SECONDS", 0)
    for index, expected in ((1, 0), (0, 2)):
        monkeypatch.setattr(console.jax, "process_index", lambda index=index: index)
        with console.Progress(3, "counting") as report:
            for done in (1, 2, 3):
                report(done)
        assert len(caplog.messages) == expected


def test_times_are_short():
    assert [console._duration(x) for x in (0.4, 59.6, 78, 3599, 7500)] == [
        "0m00s",
        "1m00s",
        "1m18s",
        "59m59s",
        "2h05m",
    ]


@pytest.mark.parametrize(
    ("scalars", "line"),
    [
        (
            {
                "train/quantizer_loss": 0.1,
                "train/loss": 0.03125,
                "train/reconstruction_loss": 0.0291,
                "train/perplexity": 4.2,
                "train/images_per_second": 31234.5,
                "train/distinct_codes": 57,
                "train/learning_rate": 1e-3,
            },
            "[50] train: loss 0.03125, reconstruction 0.0291, codes 57, learning rate 0.001, "
            "images/s 31,234",
        ),
        (
            {
                "validation/reconstruction_loss": 0.0291,
                "validation/psnr": 15.42,
                "validation/ssim": 0.7,
                "validation/loss": 0.031,
                "validation/perplexity": 4.2,
                "validation/distinct_codes": 11474539,
            },
            "[50] validation: loss 0.031, reconstruction 0.0291, PSNR 15.42, SSIM 0.7, "
            "codes 11,474,539",
        ),
        (
            {f"train/figure_{i}": i for i in range(7)},
            "[50] train: figure_0 0, figure_1 1, figure_2 2, figure_3 3, figure_4 4",
        ),
        ({"accuracy": 0.5}, "[50] accuracy 0.5"),
    ],
)
def test_the_console_shows_five_figures(scalars, line, caplog):
    caplog.set_level("INFO", logger="absl")
    console.ConsoleWriter().write_scalars(50, scalars)
    assert caplog.messages == [line]


def test_a_markdown_table_is_aligned_and_escapes_bars():
    assert console.markdown_table(
        ("name", "n"), [("a|b", 12345), ("longer", "")], aligned=True
    ) == ("| name   | n     |\n| ------ | ----- |\n| a\\|b   | 12345 |\n| longer |       |")


def test_tqdm_is_imported_only_when_something_is_shown():
    script = "import sys, llvq.runtime.console; sys.exit('tqdm' in sys.modules)"
    assert run(script, None).wait() == 0
