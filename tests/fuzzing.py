"""Fuzzing: damage to files, and a process of its own in which each case is tried.

A case must end within a deadline in success or in one clear line. It runs in a child so that a
hang or a crash of a decoder in C++ is noticed, named and survived.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import random

from hypothesis import strategies as st

DEADLINE_SECONDS = 120.0  # of a case that takes a second or less on a quiet machine

# Where in a file: a part of its length, or so many bytes from its beginning or its end, where
# headers, tables of contents and checksums are.
_places = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 64), st.integers(-64, -1))
_lengths = st.one_of(st.integers(1, 16), st.sampled_from([100, 1000, 4096, 65536]))
_replacements = st.sampled_from(
    [None, True, False, 0, -1, 3, 2**31, 10**30, 0.5, 1e300, "", "x", "1", "ä\n", [], [0], {}]
)
_of_bytes = st.one_of(
    st.tuples(st.just("flip"), _places, st.integers(0, 7)),
    st.tuples(st.just("set"), _places, st.integers(0, 255)),
    st.tuples(st.just("zero"), _places, _lengths),
    st.tuples(st.just("delete"), _places, _lengths),
    st.tuples(st.just("duplicate"), _places, _lengths),
    st.tuples(st.just("insert"), _places, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("swap"), _places, _places),
    st.tuples(st.just("truncate"), _places, st.none()),
    st.tuples(st.just("extend"), st.none(), st.sampled_from([b"\0", b"\n", b"x" * 5000])),
    st.tuples(st.just("empty"), st.none(), st.none()),
)
_of_json = st.tuples(st.just("json"), st.integers(0, 2**32 - 1), _replacements)
_of_files = st.tuples(st.sampled_from(["remove", "directory", "other"]), st.none(), st.none())


def damages(is_json):
    """What to do to a file, as (kind, where, what) of each damage."""
    usual = _of_json if is_json else _of_bytes
    return st.lists(st.one_of(usual, usual, _of_bytes, _of_files), min_size=1, max_size=3)


def damage(path, others, damages):
    """Does to a file what was drawn; `others` are files whose content it may get."""
    for kind, a, b in damages:
        if kind == "remove":
            path.unlink()
            return
        if kind == "directory":
            path.unlink()
            path.mkdir()
            return
        if kind == "other":
            others = [other for other in others if other != path] or [path]
            path.write_bytes(others[len(damages) % len(others)].read_bytes())
        elif kind == "json":
            path.write_bytes(_damage_json(path.read_bytes(), random.Random(a), b))
        else:
            path.write_bytes(_damage_bytes(path.read_bytes(), kind, a, b))


def _damage_bytes(content, kind, a, b):
    def index(place):
        if isinstance(place, float):
            return int(place * len(content))
        return max(min(place % (len(content) + 64), len(content) - 1), 0)

    if kind == "empty":
        return b""
    if kind == "extend":
        return content + b
    i = index(a)
    if kind == "truncate":
        return content[:i]
    if kind == "insert":
        return content[:i] + b + content[i:]
    if not content:
        return content
    if kind == "flip":
        return content[:i] + bytes([content[i] ^ 1 << b]) + content[i + 1 :]
    if kind == "set":
        return content[:i] + bytes([b]) + content[i + 1 :]
    if kind == "swap":
        i, j = sorted((i, index(b)))
        length = min(32, j - i)
        first, second = content[i : i + length], content[j : j + length]
        return content[:i] + second + content[i + length : j] + first + content[j + length :]
    block = content[i : i + b]
    middle = {"zero": bytes(len(block)), "delete": b"", "duplicate": block + block}[kind]
    return content[:i] + middle + content[i + b :]


def _damage_json(content, rng, replacement):
    """Replaces or drops some value of a JSON document; leaves anything else as it is."""
    try:
        document = json.loads(content)
    except ValueError:
        return content
    places = []

    def visit(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if isinstance(document, dict | list):
        visit(document)
    if not places:
        return json.dumps(replacement).encode()
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = replacement
    return json.dumps(document).encode()


def contents(directory):
    """{path: digest} of all files below a directory, and None for directories."""
    return {
        path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
        for path in directory.rglob("*")
    }


class Child:
    """Runs functions of tests/fuzz_targets.py, one at a time, in a process of its own."""

    def __init__(self):
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

    def __call__(self, function, *arguments):
        """(kind, result) of a function; AssertionError if it hangs, crashes or is unclear."""
        try:
            kind, result = self._pool.submit(function, *arguments).result(DEADLINE_SECONDS)
        except TimeoutError:
            self.stop()
            self._start()
            raise AssertionError(f"no end after {DEADLINE_SECONDS:.0f} s") from None
        except concurrent.futures.process.BrokenProcessPool:
            self._start()
            raise AssertionError("the process crashed") from None
        if kind == "refused":
            assert_clear(result)
        return kind, result

    def stop(self):
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def assert_clear(line):
    assert isinstance(line, str)
    assert line.strip()
    assert line.splitlines() == [line]
    assert "Traceback" not in line
    assert len(line) < 1000
