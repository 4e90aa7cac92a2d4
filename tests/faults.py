"""What a run survives: python -m tests.faults [CASE …] [--kills=50] [--flips=2] [--seed=0]

Does to runs on the tiny data set what machines do to real ones, and prints a Markdown table of what
was tried and what came of it; ends with 1 if anything was lost. tests/test_faults.py runs the same
cases; --kills and --flips (a file) set how long it takes.

Every run is a process of its own, forked before JAX has any threads: that saves the imports, half
of the time. A run that takes longer than it may is killed, and counts as a hang.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import logging as python_logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# Before JAX is imported. Compiled once, for all runs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
from absl import logging

from llvq import checkpointing, evaluate, train
from llvq.errors import UserError
from llvq.runtime.background import BackgroundWriter
from tests import tiny
from tests.runs import abstract_state

TIMEOUT = 300.0  # seconds for a single run: some 5 on a quiet machine
SKIPPED = 77  # the exit code of a run that this machine does not allow

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Ended:
    """How a run ended: its exit code and everything it printed, a UserError in the last line."""

    code: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


class SkipError(Exception):
    """This machine does not allow the case."""


def start(function: Callable[[], None], log: Path) -> int:
    """Forks a process that calls a function and ends; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()  # what it starts goes with it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        function()
        code = 0
    except SkipError as error:
        print(error)
        code = SKIPPED
    except UserError as error:
        print(error)
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, log: Path, timeout: float = TIMEOUT) -> Ended:
    """Waits for a started process; kills it if it takes too long."""
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), log.read_text())
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"hangs after {timeout:.0f} s: {log.read_text()}")
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def run(function: Callable[[], None], directory: Path) -> Ended:
    """Calls a function in a process of its own, to its end."""
    directory.mkdir(parents=True, exist_ok=True)
    ended = wait(start(function, directory / "log"), directory / "log")
    if ended.code == SKIPPED:
        raise SkipError(ended.last_line)
    return ended


def config(num_steps: int, **overrides):
    """Of runs that save at every step, with as little to trace as can be."""
    fields = {
        "num_train_steps": num_steps,
        "checkpoint_every_steps": 1,
        "eval_every_steps": 4,
        "log_every_steps": 1000,
        "model.num_residual_blocks": 0,
        **overrides,
    }
    return tiny.config("vq_ema", **fields)


class Interrupted:
    """The tiny data set, in which something happens before some training batches are read."""

    def __init__(self, actions: dict[int, Callable[[], None]]):
        """Actions by the number of training batches that this process has read before."""
        self._data, self._actions = tiny.dataset(), actions
        self.num_images, self.image_shape = self._data.num_images, self._data.image_shape

    def batches(self, split, index_batches):
        for number, batch in enumerate(self._data.batches(split, index_batches)):
            if split == "train" and number in self._actions:
                self._actions[number]()
            yield batch


def train_to(num_steps: int, workdir: Path, result: Path, data=None, make_writer=None, **overrides):
    """Trains; then writes every array of the final state to a file."""
    writer = {} if make_writer is None else {"make_writer": make_writer}
    fields = config(num_steps, **overrides)
    state = train.train_and_evaluate(fields, workdir, data or tiny.dataset(), **writer)
    np.savez(result, **arrays(state))


def arrays(state) -> Arrays:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def load(result: Path) -> Arrays:
    with np.load(result) as file:
        return dict(file)


def identical(a: Arrays, b: Arrays) -> bool:
    """Whether all arrays have the same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        (x.dtype, x.shape, x.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())
        for name, x in a.items()
    )


def undisturbed(num_steps: int, directory: Path) -> Arrays:
    """The final state of a run that nothing happens to."""
    ended = run(lambda: train_to(num_steps, directory / "w", directory / "end.npz"), directory)
    assert ended.code == 0, ended.output
    return load(directory / "end.npz")


def steps(workdir: Path) -> list[int]:
    """Of the finished checkpoints in a workdir."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return sorted(int(name) for name in names if name.isdecimal())


def being_saved(workdir: Path) -> set[tuple[str, int]]:
    """What is being written, or was when the run was killed: names and times of last change."""
    found = set()
    for path in workdir.glob("checkpoints/*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def own_file_system(mount: list[str], directory: Path) -> None:
    """Gives this process a file system of its own, mounted on a directory; needs no rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    ids = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts):
        raise SkipError(f"no user namespaces ({os.strerror(ctypes.get_errno())})")
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in zip(("uid", "gid"), ids, strict=True):
        Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    directory.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", *mount, str(directory)], capture_output=True, text=True)
    if mounted.returncode:
        raise SkipError(f"mount: {mounted.stderr.strip()}")


# The cases: each takes a new directory and the options, and returns what was tried and what came of
# it, or raises AssertionError.


def kills(directory: Path, options) -> Iterator[tuple[str, str]]:
    """SIGKILL: half of them at any moment of a run, half while a checkpoint is being written."""
    num_steps = 30
    expected = undisturbed(num_steps, directory / "unkilled")
    randomness = random.Random(options.seed)
    num_kills = num_during_save = num_runs = 0
    first_save = 2.0  # seconds from the start of a run, learned below
    while num_kills < options.kills:
        num_runs += 1
        here = directory / f"run_{num_runs}"
        here.mkdir()
        workdir, log, result = here / "w", here / "log", here / "end.npz"
        while not result.exists():
            saved, leftovers = steps(workdir), being_saved(workdir)
            begin = time.monotonic()
            pid = start(lambda w=workdir, r=result: train_to(num_steps, w, r), log)
            if num_kills % 2:
                moment = begin + randomness.uniform(0, 1.5 * first_save)
            else:
                which, names = randomness.randint(1, 3), set()
                while len(names) < which and is_running(pid):
                    names |= {name for name, _ in being_saved(workdir) - leftovers}
                    assert time.monotonic() < begin + TIMEOUT, f"hangs: {log.read_text()}"
                moment = time.monotonic() + randomness.uniform(0, 0.05)
                if which == 1:
                    first_save = moment - begin
            while is_running(pid) and (num_kills == options.kills or time.monotonic() < moment):
                time.sleep(0.001)
                assert time.monotonic() < begin + TIMEOUT, f"hangs: {log.read_text()}"
            if is_running(pid):
                os.killpg(pid, signal.SIGKILL)
            ended = wait(pid, log)
            if ended.code != 0:
                assert ended.code == -signal.SIGKILL, ended.output
                num_kills += 1
                num_during_save += bool(being_saved(workdir) - leftovers)
                assert max([0, *saved]) <= max([0, *steps(workdir)]), "a checkpoint is lost"
        assert identical(load(result), expected), f"{here} does not end as the unkilled run"
        shutil.rmtree(workdir)
    yield (
        f"SIGKILL {num_kills} times, {num_during_save} of them during a save",
        f"all {num_runs} runs of {num_steps} steps end bit-identical to the unkilled one",
    )


def flip(path: Path, randomness: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = randomness.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path, randomness: random.Random) -> None:
    os.truncate(path, randomness.randrange(path.stat().st_size))


def delete(path: Path, randomness: random.Random) -> None:
    path.unlink()


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = python_logging.Handler(python_logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.get_absl_logger()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def error_of(function: Callable[[], object]) -> str:
    """The one line in which a call that must fail does so."""
    error = None
    try:
        function()
    except UserError as raised:
        error = str(raised)
    assert error, "no error"
    assert "\n" not in error
    return error


def damage(directory: Path, options) -> Iterator[tuple[str, str]]:
    """Files of checkpoints truncated, with a flipped bit, and deleted, one at a time."""
    ended = run(lambda: damage_all(directory, options), directory)
    assert ended.code == 0, ended.output
    rows = [line.removeprefix("ROW ") for line in ended.output.splitlines() if line[:4] == "ROW "]
    yield from (tuple(row.split(": ", 1)) for row in rows)


def damage_all(directory: Path, options) -> None:
    randomness = random.Random(options.seed)
    whole, copy = directory / "whole", directory / "copy"
    # Kept: 4, the best but for 8, and 6, 7, 8.
    fields = config(8, keep_checkpoints=3)
    state = train.train_and_evaluate(fields, whole, tiny.dataset())
    seven = config(7)
    before = arrays(train.train_and_evaluate(seven, directory / "seven", tiny.dataset()))
    newest = arrays(state)
    assert steps(whole) == [4, 6, 7, 8]

    def attempt(action: Callable[[Path], None], path: Path) -> bool:
        """Whether damage to a file or item of checkpoint 8 makes 7 the one to go on from."""
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        action(copy / path)
        with recorded_warnings() as warnings:
            checkpoint, _, loaded = checkpointing.load(copy)
            assert steps(copy) == [4, 6, 7, 8]  # who evaluates changes nothing
            resumed = checkpointing.resume(copy, abstract_state)
            restored = arrays(resumed.state)
        if identical(restored, newest):
            assert (checkpoint.name, steps(copy), warnings) == ("8", [4, 6, 7, 8], []), path
            return False
        assert identical(restored, before), f"damage to {path} goes unnoticed"
        assert steps(copy) == [4, 6, 7], path
        assert (copy / "checkpoints/8.damaged").is_dir()
        assert all("checkpoints/8 " in line and "checkpoints/7" in line for line in warnings)
        if checkpoint.name == "8":  # the optimizer's arrays, which only training reads
            assert len(warnings) == 1, warnings
            assert identical(arrays(loaded.params), arrays_of(newest, ".params")), path
            return True
        assert len(warnings) == 2, warnings
        assert identical(arrays(loaded.params), arrays_of(before, ".params")), path
        (copy / "checkpoints/8.damaged").rename(copy / "checkpoints/8")
        explicit = error_of(lambda: checkpointing.load(copy / "checkpoints/8"))
        assert "checkpoints/8" in explicit
        return True

    files = [path.relative_to(whole) for path in (whole / "checkpoints/8").rglob("*")]
    files = sorted(path for path in files if (whole / path).is_file())
    actions = [truncate, delete] + options.flips * [flip]
    found = [
        attempt(functools.partial(action, randomness=randomness), path)
        for path in files
        for action in actions
        if action is delete or (whole / path).stat().st_size
    ]
    found += [attempt(shutil.rmtree, Path("checkpoints/8") / item) for item in ("state", "config")]
    assert sum(found) >= 10  # the rest is in files that are never read
    print(
        f"ROW a file of the newest checkpoint truncated, flipped, deleted ({len(found)} times): "
        f"{sum(found)} times found, the one before used and both named; else the state was intact"
    )

    # A whole run over it, twice: steps 8 and 9 are saved again.
    expected = arrays(train.train_and_evaluate(config(9), directory / "nine", tiny.dataset()))
    shutil.rmtree(copy)
    shutil.copytree(whole, copy)
    os.truncate(copy / "checkpoints/4/metrics/metrics", 20)  # by which the manager ranks
    for aside in ("8.damaged", "8.damaged2"):
        os.truncate(copy / "checkpoints/8/config/metadata", 20)
        shutil.rmtree(copy / "checkpoints/9", ignore_errors=True)
        state = train.train_and_evaluate(config(9, keep_checkpoints=3), copy, tiny.dataset())
        assert identical(arrays(state), expected)
        assert (copy / "checkpoints" / aside).is_dir()
    assert steps(copy)[-2:] == [8, 9]
    assert (copy / "checkpoints/4.damaged").is_dir()
    print("ROW a run goes on before a damaged checkpoint: it ends bit-identical and saves it again")

    before_error = sorted(copy.rglob("*"))
    for step in steps(copy):
        (copy / f"checkpoints/{step}/state/manifest.ocdbt").unlink()
    message = error_of(lambda: train.train_and_evaluate(config(9), copy, tiny.dataset()))
    assert "checkpoints/9 cannot be read" in message
    assert "nor can the" in message
    assert "nor can the" in error_of(lambda: checkpointing.load(copy))
    assert len(sorted(copy.rglob("*"))) == len(before_error) - len(steps(copy))
    print("ROW every checkpoint damaged: one line says so, and nothing is renamed or deleted")


def arrays_of(state: Arrays, prefix: str) -> Arrays:
    """A part of a state's arrays, named from there on."""
    return {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }


def fill(directory: Path, leave: int = 0) -> None:
    """Fills a file system up to some bytes."""
    with (directory / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(directory / "filling", (directory / "filling").stat().st_size - leave)


def full_disk(directory: Path, options) -> Iterator[tuple[str, str]]:
    """A disk that fills up between two saves, or so that a save finds room for its beginning."""
    expected = undisturbed(8, directory / "undisturbed")
    disk, result = directory / "disk", directory / "end.npz"

    def stops(leave: int) -> None:
        own_file_system(["-t", "tmpfs", "-o", "size=4M", "tmpfs"], disk)
        data = Interrupted({5: lambda: fill(disk, leave)})
        message = error_of(lambda: train_to(8, disk / "w", result, data))
        assert "could not be saved" in message, message
        assert "o space left on device" in message, message
        assert "the last good checkpoint is" in message, message
        assert int(message.rsplit("/", 1)[1]) == steps(disk / "w")[-1] >= 4, message
        (disk / "filling").unlink()
        train_to(8, disk / "w", result)

    def goes_on() -> None:
        own_file_system(["-t", "tmpfs", "-o", "size=4M", "tmpfs"], disk)
        data = Interrupted({3: lambda: fill(disk), 6: (disk / "filling").unlink})
        with recorded_warnings() as warnings:
            train_to(8, disk / "w", result, data, stop_on_failed_save=False)
        assert any("step 4 could not be saved" in line for line in warnings), warnings
        assert steps(disk / "w")[-2:] == [7, 8]
        data = Interrupted({1: lambda: fill(disk)})
        message = error_of(
            lambda: train_to(10, disk / "w", result, data, stop_on_failed_save=False)
        )
        assert "step 10 could not be saved" in message  # the end of a run is worth an error

    def evaluation() -> None:
        own_file_system(["-t", "tmpfs", "-o", "size=4M", "tmpfs"], disk)
        train_to(8, disk / "w", result)
        evaluate.evaluate(config(8), disk / "w", tiny.dataset())
        files = [disk / "w" / name for name in ("evaluation.json", "reconstructions.png")]
        before = [path.read_bytes() for path in files]
        fill(disk)
        message = error_of(lambda: evaluate.evaluate(config(8), disk / "w", tiny.dataset()))
        assert "cannot be written (No space left on device)" in message, message
        assert before == [path.read_bytes() for path in files]

    for name, function, outcome in (
        ("full", lambda: stops(0), "one line; resumed, it ends bit-identical"),
        ("all but full", lambda: stops(40_000), "one line; resumed, it ends bit-identical"),
        ("full, and stop_on_failed_save=False", goes_on, "a warning, later saves succeed"),
        ("full at the end of an evaluation", evaluation, "one line, and the files of the last one"),
    ):
        result.unlink(missing_ok=True)
        ended = run(function, directory / name)
        assert ended.code == 0, ended.output
        if function is not goes_on:
            assert identical(load(result), expected), name
        yield f"disk {name}", outcome


def read_only(directory: Path, options) -> Iterator[tuple[str, str]]:
    def attempt() -> None:
        own_file_system(["-t", "tmpfs", "tmpfs"], directory / "disk")
        train_to(4, directory / "disk/w", directory / "end.npz")
        subprocess.run(["mount", "-o", "remount,ro", directory / "disk"], check=True)
        for workdir in (directory / "disk/w", directory / "disk/new"):
            message = error_of(lambda w=workdir: train_to(8, w, directory / "end.npz"))
            assert f"--workdir={workdir} cannot be written to: Read-only" in message, message
            error_of(lambda w=workdir: evaluate.evaluate(config(8), w, tiny.dataset()))

    ended = run(attempt, directory)
    assert ended.code == 0, ended.output
    yield "read-only workdir, to train and to evaluate", "one line"


def clock(directory: Path, options) -> Iterator[tuple[str, str]]:
    """Every look at the clock finds it seconds off; and now and then it is set by days."""
    expected = undisturbed(8, directory / "undisturbed")
    randomness = random.Random(options.seed)
    workdir, result = directory / "w", directory / "end.npz"
    real, offset = time.time, 0.0

    def jump(seconds: float) -> None:
        nonlocal offset
        while being_saved(workdir):
            time.sleep(0.001)
        offset += seconds

    def wrong_clock() -> None:
        # By this clock Orbax gives up on saves that take minutes: it must not jump by more in one.
        time.time = lambda: real() + offset + randomness.uniform(-20, 20)
        time.time_ns = lambda: int(time.time() * 1e9)

        class WrongDatetime(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromtimestamp(time.time(), tz)

        datetime.datetime = WrongDatetime

    def between_saves() -> None:
        wrong_clock()
        days = {step: lambda d=d: jump(86400.0 * d) for step, d in enumerate((9, -20))}
        train_to(4, workdir, result, Interrupted(days))
        train_to(8, workdir, result, Interrupted(days))

    ended = run(between_saves, directory)
    assert ended.code == 0, ended.output
    assert identical(load(result), expected)
    kept = [steps(path) for path in (workdir, directory / "undisturbed/w")]
    assert kept[0] == kept[1], kept
    yield (
        "clock set by days between saves, up to 20 s off at every look",
        "ends bit-identical, the same checkpoints kept",
    )


def removed(directory: Path, options) -> Iterator[tuple[str, str]]:
    """What lies in the workdir is removed while the run writes to it."""
    expected = undisturbed(8, directory / "undisturbed")
    workdir, result = directory / "w", directory / "end.npz"

    def remove_events() -> None:
        (events,) = workdir.glob("events.out.*")
        events.unlink()

    def writer():
        try:
            from clu import metric_writers
        except ImportError as error:
            raise SkipError(f"TensorBoard's files are written by {error.name}") from error
        return BackgroundWriter(lambda: metric_writers.SummaryWriter(str(workdir)))

    ended = run(
        lambda: train_to(
            8, workdir, result, Interrupted({5: remove_events}), writer, log_every_steps=1
        ),
        directory / "events",
    )
    assert ended.code == 0, ended.output
    assert identical(load(result), expected)
    yield "TensorBoard's file removed while running", "same end; later metrics are lost"

    shutil.rmtree(workdir)
    result.unlink()
    away = Interrupted({5: lambda: workdir.rename(directory / "away")})
    ended = run(lambda: train_to(8, workdir, result, away), directory / "workdir")
    if ended.code == 0:  # it was gone between two saves: Orbax makes it anew
        assert identical(load(result), expected)
        assert steps(workdir)[-1] == 8
    else:
        assert ended.code == 1, ended.output
        assert "step 5 could not be saved" in ended.last_line or "step 6 could" in ended.last_line
        assert len(ended.last_line) < 600
    yield "workdir removed while running", "one line; or, between two saves, it is made anew"


CASES = (kills, damage, full_disk, read_only, clock, removed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Does to runs what machines do, prints a table.")
    names = [case.__name__ for case in CASES]
    parser.add_argument("case", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=2, help="flipped bits to try in every file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.case) - set(names):
        parser.error(f"there is no case {min(unknown)}: choose from {', '.join(names)}")
    failed = False
    print("| tried | outcome | seconds |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", f"{directory}/compiled")
        for case in CASES:
            if options.case and case.__name__ not in options.case:
                continue
            begin = time.monotonic()
            try:
                rows = list(case(Path(directory) / case.__name__, options))
            except SkipError as error:
                rows = [(case.__name__, f"skipped: {error}")]
            except AssertionError as error:
                print(error, file=sys.stderr)
                last = str(error).strip().splitlines()[-1:]
                rows, failed = [(case.__name__, f"**FAILED**: {' '.join(last)}")], True
            for row in rows:
                print(f"| {' | '.join(row)} | {time.monotonic() - begin:.0f} |", flush=True)
                begin = time.monotonic()
    sys.exit(failed)


if __name__ == "__main__":
    main()
