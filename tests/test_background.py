"""A metric writer in a thread of its own: order, errors, and that nobody waits for it."""

import threading
import time

import pytest

from llvq.errors import DivergenceError, UserError
from llvq.runtime.background import BackgroundWriter
from llvq.train import train_and_evaluate
from tests import tiny
from tests.runs import Recorder


class Steps(Recorder):
    def __init__(self):
        super().__init__()
        self.steps = []

    def write_scalars(self, step, scalars):
        self.steps.append(step)

    def close(self):
        self.steps.append("close")


class Failing(Steps):
    def write_scalars(self, step, scalars):
        raise OSError("{{function_node write}} disk is full\nand more")


def test_writes_in_order_without_waiting():
    recorder, may_begin = Steps(), threading.Event()

    def make():
        may_begin.wait(30)
        return recorder

    writer = BackgroundWriter(make)
    for step in range(100):
        writer.write_scalars(step, {"train/loss": float(step)})
    assert not recorder.steps
    may_begin.set()
    writer.close()
    assert recorder.steps == [*range(100), "close"]


def call_until_it_fails(writer):
    for _ in range(1000):
        writer.write_images(2, {})
        time.sleep(0.01)


@pytest.mark.parametrize("ending", [BackgroundWriter.close, call_until_it_fails])
def test_an_error_is_one_line(ending):
    writer = BackgroundWriter(Failing)
    writer.write_scalars(1, {"train/loss": 0.0})
    with pytest.raises(UserError, match=r"^metrics cannot be written \(disk is full\): the same"):
        ending(writer)


def test_a_writer_that_cannot_be_made_is_an_error():
    def make():
        raise OSError("no such place")

    writer = BackgroundWriter(make)
    writer.write_texts(0, {})
    with pytest.raises(UserError, match="no such place"):
        writer.close()


def test_a_mistake_of_the_program_keeps_its_traceback():
    writer = BackgroundWriter(lambda: object())
    writer.write_texts(0, {})
    with pytest.raises(AttributeError, match="write_texts"):
        writer.close()


def test_what_ends_the_training_goes_before(tmp_path):
    """The loss becomes infinite, and the writer cannot be closed either."""

    class Unclosable(Recorder):
        def close(self):
            raise OSError("disk is full")

    config = tiny.config("sparse_lattice", learning_rate=1e30, log_every_steps=1)
    with pytest.raises(DivergenceError):
        train_and_evaluate(
            config, tmp_path, tiny.dataset(), make_writer=lambda: BackgroundWriter(Unclosable)
        )
