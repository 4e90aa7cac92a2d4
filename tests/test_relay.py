"""What the native code of a process in a run of several writes last, as it crashes, is seen."""

import signal

import pytest

from tests import groups

_JOIN = "import os, sys; from llvq.runtime import distributed as d; d.initialize('{}', 1, 0); "
_CRASHES = {
    "abort": ("import faulthandler as f; f.enable(2); os.abort()", "Fatal Python error: Aborted"),
    "segmentation fault": (
        "import ctypes, faulthandler as f; f.enable(2); ctypes.string_at(0)",
        "Fatal Python error: Segmentation fault",
    ),
    "glibc": (
        "import ctypes as c; c.CDLL(None).free(c.byref(c.create_string_buffer(64), 16))",
        "invalid pointer",
    ),
    "XLA": ("os.write(2, b'F0000 a.cc:1] Check failed: a == b'); os.abort()", "Check failed: a =="),
}


@pytest.mark.parametrize("kind", _CRASHES)
def test_a_crash_report_is_seen(kind):
    crash, report = _CRASHES[kind]
    commands = [("-c", _JOIN.format(groups.free_address()) + crash) for _ in range(3)]
    with groups.group(*commands) as processes:
        for code, errors in groups.finish(processes):
            assert code in (-signal.SIGABRT, -signal.SIGSEGV), errors
            assert report in errors


def test_the_last_words_are_last_and_said_once():
    """JAX is about to abort, while another thread has a reason of its own to leave."""
    script = (
        "os.write(2, b'one\\ntwo\\n'); d._relay.set_last_words('lost'); print('python', "
        "file=sys.stderr); os.write(2, b'F0 Terminating process because the JAX distributed "
        "service detected fatal errors.\\n*** Check failure stack trace: ***\\n'); d.leave('left')"
    )
    with groups.group(("-c", _JOIN.format(groups.free_address()) + script)) as processes:
        ((code, errors),) = groups.finish(processes)
    assert code == 1
    assert sorted(errors.splitlines()[:-1]) == ["one", "python", "two"]
    assert errors.splitlines()[-1] == "-c: lost"


def test_a_process_whose_relay_is_gone_still_says_why_it_leaves():
    script = "d._relay._process.kill(); d._relay._process.wait(); d.leave('left', 75)"
    with groups.group(("-c", _JOIN.format(groups.free_address()) + script)) as processes:
        assert groups.finish(processes) == [(75, "-c: left\n")]
