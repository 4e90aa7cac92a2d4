"""Streams of earlier versions, which every later version must decode.

    python -m tests.test_codec_vectors

writes the streams of today's version to tests/codec_vectors.json, where they are kept for good: the
format's version must rise before they may change.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from llvq import Codec
from llvq.codec import code_model, integers
from llvq.codec.code_model import CodeModel, Contexts
from llvq.codec.coder import Block, Coder

FILE = Path(__file__).with_name("codec_vectors.json")
VECTORS = json.loads(FILE.read_text()) if FILE.exists() else []

# Tables and codes in closed form, so that they are the same for good.
NUM_CODES, WIDTH = 20, 2
SHAPE = (2, 5, 7)


def tables():
    """A code model of integer formulas."""

    def share(counts):
        return code_model.frequencies(np.array(counts, np.int64))

    contexts = 4 * 4
    ids = np.concatenate([[i % 7, 7 + i % 11, -1] for i in range(contexts)])
    shares = np.concatenate([share([90 + i, 40, 7 * i + 1]) for i in range(contexts)])
    return CodeModel(
        "tables in closed form",
        np.array([[i, -(i**2)] for i in range(NUM_CODES)], np.int32),
        share([1000 // (i + 1) for i in range(NUM_CODES)] + [60]),
        np.stack([share([i % 13 == d for i in range(integers.NUM_SYMBOLS)]) for d in range(WIDTH)]),
        Contexts(
            np.array([0, 3], np.int32),
            3 * np.arange(1, contexts + 1, dtype=np.int32),
            ids.astype(np.int32),
            shares.astype(np.int32),
        ),
    )


def block():
    """Ids with escapes, and escaped codes of all sizes."""
    places = np.arange(np.prod(SHAPE))
    ids = (places**2 // 3 % (NUM_CODES + 1)).astype(np.int32).reshape(SHAPE)
    count = int(np.sum(ids == NUM_CODES)) * WIDTH
    escaped = [(-1) ** i * (2 ** (2 * i % 32) - i) for i in range(count)]
    return Block(ids, np.array(escaped, np.int32).reshape(-1, WIDTH))


def digest(codes):
    return hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()


@pytest.mark.parametrize("vector", [v for v in VECTORS if "model" not in v], ids=str)
def test_a_block_of_an_earlier_version_decodes(vector):
    data = base64.b64decode(vector["data"])
    found = Coder(tables()).decode(data, SHAPE, with_contexts=vector["with_contexts"])
    np.testing.assert_array_equal(found.ids, block().ids)
    np.testing.assert_array_equal(found.escaped, block().escaped)
    assert Coder(tables()).encode(block(), with_contexts=vector["with_contexts"]) == data


@pytest.mark.parametrize("vector", [v for v in VECTORS if "model" in v], ids=lambda v: v["model"])
def test_a_stream_of_an_earlier_version_decodes(vector):
    codec = Codec.load(vector["model"])
    stream = base64.b64decode(vector["data"])
    codes = codec.decompress_codes(stream)
    assert list(codes.shape) == vector["shape"]
    assert digest(codes) == vector["sha256"]
    again = codec.compress_codes(codes, contexts=vector["with_contexts"])
    assert again[30:] == stream[30:]  # the header says that it holds codes


def test_there_are_vectors_of_every_kind():
    kinds = {(v.get("model"), v["with_contexts"]) for v in VECTORS}
    models = ("vq", "vq_ema", "sparse_lattice", "dense_lattice")
    names = [None, *(f"fashion_mnist/{model}" for model in models)]
    assert kinds == {(name, option) for name in names for option in (False, True)}


def write(test_image):
    """Writes today's streams of an image, uint8 [1, 28, 28, 1]; of its corner for dense codes."""
    vectors = []
    for option in (False, True):
        data = Coder(tables()).encode(block(), with_contexts=option)
        vectors.append({"with_contexts": option, "data": base64.b64encode(data).decode()})
    for name in ("vq", "vq_ema", "sparse_lattice", "dense_lattice"):
        codec = Codec.load(f"fashion_mnist/{name}")
        for option in (False, True):
            stream = codec.compress(test_image, contexts=option)
            if name == "dense_lattice":
                codes = codec.decompress_codes(stream)[:, 6:8, 6:8]
                stream = codec.compress_codes(codes, contexts=option)
            codes = codec.decompress_codes(stream)
            vectors.append(
                {
                    "model": f"fashion_mnist/{name}",
                    "with_contexts": option,
                    "shape": codes.shape,
                    "sha256": digest(codes),
                    "data": base64.b64encode(stream).decode(),
                }
            )
    FILE.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    import input_pipeline

    write(input_pipeline.load("fashion_mnist").resident("test")[:1])
