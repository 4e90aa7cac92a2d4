"""What a run survives: kills, full and read-only disks, wrong clocks."""

import contextlib
import ctypes
import datetime
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from llvq import evaluate, train
from llvq.errors import UserError
from tests import processes, tiny
from tests.runs import leaves

NUM_STEPS = 8


def config(num_steps, **overrides):
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


def evaluate_in(workdir):
    return evaluate.evaluate(workdir, tiny.dataset())


class Interrupted:
    """The tiny data set, in which something happens before some training batches are read."""

    def __init__(self, actions):
        """Actions by the number of training batches that this process has read before."""
        self._data, self._actions = tiny.dataset(), actions
        self.num_images, self.image_shape = self._data.num_images, self._data.image_shape

    def batches(self, split, index_batches):
        for number, batch in enumerate(self._data.batches(split, index_batches)):
            if split == "train" and number in self._actions:
                self._actions[number]()
            yield batch


def train_to(num_steps, directory, actions=None, *, workdir="w", **overrides):
    """Trains in DIRECTORY/WORKDIR; then writes every array of the final state to end.npz."""
    data = Interrupted(actions or {})
    state = train.train_and_evaluate(config(num_steps, **overrides), directory / workdir, data)
    np.savez(directory / "end.npz", **leaves(state))


def end_of(directory):
    """The bytes of a finished run's final state."""
    with np.load(directory / "end.npz") as arrays:
        return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    processes.run(directory, train_to, NUM_STEPS, directory)
    return directory


def steps(workdir):
    """Of the finished checkpoints."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return sorted(int(name) for name in names if name.isdecimal())


def being_saved(workdir):
    """What is being written, or was when the run was killed: names and times of last change."""
    found = set()
    for path in workdir.glob("checkpoints/*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


@pytest.mark.parametrize(
    "num_kills",
    [pytest.param(6, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)],
)
def test_kills(num_kills, tmp_path):
    """Half of them at any moment of a run, half while a checkpoint is being written."""
    num_steps, log, randomness = 30, tmp_path / "log", random.Random(0)
    begin = time.monotonic()
    processes.run(tmp_path, train_to, num_steps, tmp_path)
    duration, expected = time.monotonic() - begin, end_of(tmp_path)
    while num_kills:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        while not (directory / "end.npz").exists():
            saved, leftovers = steps(directory / "w"), being_saved(directory / "w")
            begin = time.monotonic()
            process = processes.start(log, train_to, num_steps, directory)
            if num_kills % 2:
                process.join(randomness.uniform(0, duration))
            elif num_kills:
                which, seen = randomness.randint(1, 3), set()
                while len(seen) < which and process.is_alive():
                    seen |= being_saved(directory / "w") - leftovers
                    assert time.monotonic() < begin + processes.SECONDS, log.read_text()
                process.join(randomness.uniform(0, 0.05))
            if num_kills and process.is_alive():
                process.kill()
            code, output = processes.end(process, log)
            assert code in (0, -signal.SIGKILL), output
            num_kills -= code != 0
            assert max([0, *saved]) <= max([0, *steps(directory / "w")]), "a checkpoint is lost"
        assert end_of(directory) == expected


def own_file_system(directory, *mount):
    """Gives this process a tmpfs of its own, mounted on a directory; needs no rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    ids = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts):
        raise processes.SkipError(f"no user namespaces ({os.strerror(ctypes.get_errno())})")
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in zip(("uid", "gid"), ids, strict=True):
        Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", *mount, "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise processes.SkipError(f"mount: {mounted.stderr.strip()}")


def small_disk(directory):
    """Mounts one of 4 MB; returns what fills it up to some bytes, and its file."""
    own_file_system(directory / "disk", "-o", "size=4M")
    filling = directory / "disk/filling"

    def fill(leave=0):
        with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(filling, filling.stat().st_size - leave)

    return fill, filling


def fill_and_stop(directory, leave):
    fill, filling = small_disk(directory)
    with pytest.raises(UserError) as error:
        train_to(NUM_STEPS, directory, {5: lambda: fill(leave)}, workdir="disk/w")
    said, newest = str(error.value).rsplit("/", 1)
    assert "could not be saved" in said
    assert "o space left on device" in said
    assert "the last good checkpoint is" in said
    assert int(newest) == steps(directory / "disk/w")[-1] >= 4
    filling.unlink()
    train_to(NUM_STEPS, directory, workdir="disk/w")


def fill_and_go_on(directory):
    fill, filling = small_disk(directory)
    options = {"workdir": "disk/w", "stop_on_failed_save": False}
    train_to(NUM_STEPS, directory, {3: fill, 6: filling.unlink}, **options)
    assert steps(directory / "disk/w")[-2:] == [7, 8]
    end = (directory / "end.npz").read_bytes()
    # The end of a run is worth an error.
    with pytest.raises(UserError, match=r"^[^\n]*step 10 could not be saved[^\n]*$"):
        train_to(10, directory, {1: fill}, **options)
    (directory / "end.npz").write_bytes(end)


def fill_and_evaluate(directory):
    fill, _ = small_disk(directory)
    train_to(NUM_STEPS, directory, workdir="disk/w")
    evaluate_in(directory / "disk/w")
    files = [directory / "disk/w" / name for name in ("evaluation.json", "reconstructions.png")]
    before = [path.read_bytes() for path in files]
    fill()
    with pytest.raises(UserError, match=r"^[^\n]*cannot be written \(No space left on device\)"):
        evaluate_in(directory / "disk/w")
    assert before == [path.read_bytes() for path in files]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "arguments"),
    # With 40 kB a save has room for its beginning.
    [
        (fill_and_stop, [0]),
        (fill_and_stop, [40_000]),
        (fill_and_go_on, []),
        (fill_and_evaluate, []),
    ],
)
def test_a_full_disk(function, arguments, undisturbed, tmp_path):
    processes.run(tmp_path, function, tmp_path, *arguments)
    assert end_of(tmp_path) == end_of(undisturbed)


def write_to_a_read_only_disk(directory):
    own_file_system(directory / "disk")
    train_to(4, directory, workdir="disk/w")
    subprocess.run(["mount", "-o", "remount,ro", directory / "disk"], check=True)
    for workdir in ("disk/w", "disk/new"):
        refusal = rf"^--workdir={directory / workdir} cannot be written to: Read-only[^\n]*$"
        with pytest.raises(UserError, match=refusal):
            train_to(NUM_STEPS, directory, workdir=workdir)
        with pytest.raises(UserError, match=r"^[^\n]*$"):
            evaluate_in(directory / workdir)


@pytest.mark.slow
def test_a_read_only_workdir(tmp_path):
    processes.run(tmp_path, write_to_a_read_only_disk, tmp_path)


def train_by_a_wrong_clock(directory):
    """Every look at the clock finds it seconds off; and between saves it is set by days."""
    randomness, real, offset = random.Random(0), time.time, [0.0]

    def jump(days):
        while being_saved(directory / "w"):
            time.sleep(0.001)
        offset[0] += 86400.0 * days

    # By this clock Orbax gives up on saves that take minutes: it must not jump by more in one.
    time.time = lambda: real() + offset[0] + randomness.uniform(-20, 20)
    time.time_ns = lambda: int(time.time() * 1e9)

    class WrongDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    datetime.datetime = WrongDatetime
    for num_steps in (4, NUM_STEPS):
        train_to(num_steps, directory, {0: lambda: jump(9), 1: lambda: jump(-20)})


@pytest.mark.long
def test_a_wrong_clock(undisturbed, tmp_path):
    processes.run(tmp_path, train_by_a_wrong_clock, tmp_path)
    assert end_of(tmp_path) == end_of(undisturbed)
    assert steps(tmp_path / "w") == steps(undisturbed / "w")
