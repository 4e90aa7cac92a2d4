"""SIGTERM at any time, one process or two: what is saved, how it ends, how it goes on."""

import contextlib
import itertools
import re
import signal
import time

import pytest

from llvq import checkpointing, train
from llvq.runtime import preemption
from tests import groups, tiny
from tests.groups import finish, group, last_lines, wait_for
from tests.runs import assert_identical, newest

SLOW = 0.05  # seconds a batch: a run of 40 steps lasts for 2 seconds and more


def command(workdir, num_steps, seconds, *options):
    return ("-m", "tests.run_main", workdir, num_steps, seconds, *options)


def stopped_at(errors):
    (line,) = last_lines(errors)
    return int(re.fullmatch(r".*stopped by SIGTERM, saved at step (\d+); .*", line)[1])


def run(workdir, num_steps, *options):
    """Trains on; returns what it says."""
    with group(command(workdir, num_steps, 0, *options)) as processes:
        ((code, errors),) = finish(processes)
    assert code == 0, errors
    return errors


@pytest.mark.slow
def test_one_process_saves_and_goes_on_bit_identical(tmp_path):
    """Stopped in the middle, asked twice; then stopped in a validation; then left alone."""
    run(tmp_path / "whole", 40)
    workdir = tmp_path / "stopped"

    with group(command(workdir, 40, SLOW)) as processes:
        wait_for(processes[0], "[5] train:")
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.2)
        processes[0].send_signal(signal.SIGTERM)  # in the step, in the save or behind it
        start = time.monotonic()
        ((code, errors),) = finish(processes)
        assert time.monotonic() - start < 20
    assert code == preemption.EXIT_CODE == 75
    first = stopped_at(errors)
    assert 5 <= first < 20
    assert newest(workdir / "checkpoints") == first

    with group(command(workdir, 40, SLOW)) as processes:
        said = wait_for(processes[0], "Validating at step 20")
        processes[0].send_signal(signal.SIGTERM)
        ((code, errors),) = finish(processes)
    assert f"Resuming at step {first} of 40" in said
    assert (code, stopped_at(errors)) == (75, 20)

    said = run(workdir, 40)
    assert "Resuming at step 20 of 40" in said
    assert said.count("Validating at step 20") == 1  # what was left out is made up for
    assert "[20] validation:" in said
    states = [checkpointing.load(tmp_path / name).state for name in ("whole", "stopped")]
    assert int(states[0].step) == 40
    assert_identical(*states)


@pytest.mark.slow
def test_before_the_first_step_and_while_evaluating(tmp_path):
    with group(command(tmp_path, 40, SLOW)) as processes:
        wait_for(processes[0], "Starting at step 0")  # it compiles now
        processes[0].send_signal(signal.SIGTERM)
        ((code, errors),) = finish(processes)
    assert (code, stopped_at(errors)) == (75, 1)

    with group(command(tmp_path, 40, 10, "--mode=evaluate")) as processes:
        wait_for(processes[0], "Evaluating")
        processes[0].send_signal(signal.SIGTERM)
        ((code, errors),) = finish(processes)
    assert code == 75
    (line,) = last_lines(errors)
    assert "stopped by SIGTERM" in line
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(tmp_path):
    def processes_of(num_steps, seconds):
        return group(*(command(tmp_path, num_steps, seconds, *x) for x in groups.options(2)))

    with processes_of(400, SLOW) as processes:
        wait_for(processes[0], "[5] train:")
        processes[1].send_signal(signal.SIGTERM)  # to one of them only
        start = time.monotonic()
        ended = finish(processes)
        assert time.monotonic() - start < 20
    assert [code for code, _ in ended] == [75, 75], ended
    steps = {stopped_at(errors) for _, errors in ended}
    assert steps == {newest(tmp_path / "checkpoints")}
    (step,) = steps
    assert 5 <= step < 30
    assert "train: loss" not in ended[1][1]  # only the first process tells

    with processes_of(step + 2, 0) as processes:
        ended = finish(processes)
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"Resuming at step {step} of {step + 2}" in ended[0][1]
    assert newest(tmp_path / "checkpoints") == step + 2


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop_while_it_evaluates(tmp_path):
    """It waits for the other, which cannot know, and leaves without it."""
    run(tmp_path, 1)
    options = [(*x, "--mode=evaluate") for x in groups.options(2)]
    with group(*(command(tmp_path, 1, 3, *x) for x in options)) as processes:
        wait_for(processes[0], "Evaluating")
        processes[0].send_signal(signal.SIGTERM)
        start = time.monotonic()
        (code, errors), (other, _) = finish(processes)
        assert time.monotonic() - start < 45
    assert code == 75
    (line,) = last_lines(errors)
    assert "stopped by SIGTERM" in line
    assert errors.endswith(f"{line}\n")
    assert other != 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "lost", "how"),
    [
        (2, 0, signal.SIGKILL),  # JAX's clients cannot do without the first process
        (2, 1, signal.SIGSTOP),  # the connection stays, the heartbeats do not
        pytest.param(4, 3, signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_a_lost_process_ends_the_run_and_the_same_commands_resume_it(count, lost, how, tmp_path):
    run(tmp_path, 2)
    commands = [command(tmp_path, 10_000, SLOW, *options) for options in groups.options(count)]
    with group(*commands) as processes:
        wait_for(processes[0], "[5] train:")
        processes[lost].send_signal(how)
        start = time.monotonic()
        ended = finish([x for i, x in enumerate(processes) if i != lost])
        assert time.monotonic() - start < 45  # LOST_SECONDS, and the time to leave
    for code, errors in ended:
        assert code in (1, -signal.SIGABRT), errors
        assert "another process of this run has ended" in errors or "another task died" in errors
        assert "Traceback" not in errors
    with group(*commands) as processes:
        wait_for(processes[0], "Resuming at step 2 of 10000")


@pytest.mark.slow
def test_stopped_in_the_last_validation(tmp_path, monkeypatch):
    """The run is at its end: what is saved stays, and the next call has nothing left to do."""
    config = tiny.config("vq", num_train_steps=4, eval_every_steps=4)

    def train_until(num_calls, workdir):
        """It is asked after each of four steps, then after the first of two batches."""

        @contextlib.contextmanager
        def stop_at_a_step(_):
            calls = itertools.count(1)
            yield lambda: next(calls) > num_calls

        with monkeypatch.context() as stopping:
            stopping.setattr(preemption, "stop_at_a_step", stop_at_a_step)
            return train.train_and_evaluate(config, workdir, tiny.dataset())

    with pytest.raises(preemption.Preempted, match="75"):
        train_until(4, tmp_path / "stopped")
    whole = train_until(5, tmp_path / "whole")  # in the last batch: the validation counts
    assert checkpointing.find(tmp_path / "whole").joinpath("metrics").exists()

    def make_writer():
        raise AssertionError("there is nothing left to do")

    again = train.train_and_evaluate(
        config, tmp_path / "stopped", tiny.dataset(), make_writer=make_writer
    )
    assert_identical(again, whole)
