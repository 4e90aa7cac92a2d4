"""Damage to files: what machines, people and other programs do to them."""

import hashlib
import json

REPLACEMENTS = (
    *(None, True, False, 0, -1, 3, 2**31, 10**30, 0.5, 1e300),
    *("", "x", "1", "ä\n", [], [0], {}),
)


def _place(content, random):
    """Somewhere, often near an end, where headers, tables of contents and checksums are."""
    near = random.choice([len(content), len(content), 64])
    place = random.randrange(max(min(near, len(content)), 1))
    return random.choice([place, len(content) - 1 - place]) if content else 0


def _block(content, random):
    start = _place(content, random)
    return start, start + random.choice([random.randint(1, 16), 100, 1000, 4096, 65536])


def flip(content, random):
    i = _place(content, random)
    return (
        content[:i]
        + bytes(b ^ 1 << random.randrange(8) for b in content[i : i + 1])
        + content[i + 1 :]
    )


def zero(content, random):
    start, end = _block(content, random)
    return content[:start] + bytes(len(content[start:end])) + content[end:]


def cut_out(content, random):
    start, end = _block(content, random)
    return content[:start] + content[end:]


def duplicate(content, random):
    start, end = _block(content, random)
    return content[:end] + content[start:]


def insert(content, random):
    i = _place(content, random)
    return content[:i] + random.randbytes(random.randint(1, 20)) + content[i:]


def truncate(content, random):
    return content[: _place(content, random)]


def extend(content, random):
    return content + random.choice([b"\0", b"\n", b"x" * 5000])


def empty(content, random):
    return b""


def change_json(content, random):
    """Replaces or drops a value of a JSON document; flips a bit of anything else."""
    try:
        document = json.loads(content)
    except ValueError:
        return flip(content, random)
    places = []

    def visit(node):
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                visit(node[key])

    visit(document)
    if not places:
        return json.dumps(random.choice(REPLACEMENTS)).encode()
    node, key = random.choice(places)
    node[key] = random.choice(REPLACEMENTS)
    if random.random() < 0.2:
        del node[key]
    return json.dumps(document).encode()


OF_BYTES = (flip, zero, cut_out, duplicate, insert, truncate, extend, empty, change_json)
KINDS = (*(function.__name__ for function in OF_BYTES), "remove", "directory", "other")


def damage(path, others, kind, random):
    """Does to a file what `kind` says; `others` are files whose content it may get."""
    if kind == "other" and not path.is_dir():
        path.write_bytes(
            random.choice([file for file in others if file != path] or [path]).read_bytes()
        )
    elif not path.is_file():
        return  # it is removed already
    elif kind in ("remove", "directory"):
        path.unlink()
        if kind == "directory":
            path.mkdir()
    else:
        function = OF_BYTES[KINDS.index(kind)]
        path.write_bytes(function(path.read_bytes(), random))


def contents(directory):
    """{path: digest} of all files below a directory, and None for directories."""
    return {
        path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
        for path in directory.rglob("*")
    }
