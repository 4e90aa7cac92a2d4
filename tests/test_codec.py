"""Codes to bits and back: tables, coder, streams, and what a damaged stream ends in."""

import math
import random
import struct
import zlib
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llvq import codec, load_pretrained
from llvq.codec import code_model as code_models
from llvq.codec import container, estimate, integers
from llvq.codec.code_model import TOTAL, CodeModel
from llvq.codec.coder import Block, Coder
from llvq.codec.passes import Passes
from llvq.codec.vocabulary import Vocabulary
from llvq.errors import UserError
from tests import tiny
from tests.real_data import needs_files
from tests.runs import create_model

INT32 = np.iinfo(np.int32)
EDGES = sorted(
    {
        value
        for k in range(32)
        for value in (s * 2**k + d for s in (1, -1) for d in (-1, 0, 1))
        if INT32.min <= value <= INT32.max
    }
)


@given(arrays.arrays(np.int32, st.integers(1, 50)))
def test_integers_come_back(values):
    values = np.concatenate([values, np.array(EDGES, np.int32)])
    parts = integers.split(values)
    np.testing.assert_array_equal(integers.join(parts), values)
    assert parts.symbols.min() >= 0
    assert parts.symbols.max() < integers.NUM_SYMBOLS
    follow = integers.num_low_bits(parts.symbols)
    for value, low, num_bits in zip(values.tolist(), parts.low.tolist(), follow, strict=True):
        assert num_bits == max(abs(value).bit_length() - 6, 0)
        assert low == abs(value) % 2 ** int(num_bits)


def test_every_symbol_is_used_and_what_is_no_int32_is_refused():
    symbols = np.arange(integers.NUM_SYMBOLS, dtype=np.int32)
    values = integers.join(integers.Parts(symbols, np.zeros(len(symbols), np.uint32)))
    np.testing.assert_array_equal(integers.split(values).symbols, symbols)
    with pytest.raises(ValueError, match="more than 32 bits"):
        integers.join(integers.Parts(symbols[-1:], np.array([1], np.uint32)))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=60))
def test_frequencies_are_whole_positive_and_in_proportion(counts):
    found = code_models.frequencies(np.array(counts, np.int64))
    assert found.sum() == TOTAL
    assert found.min() >= 1
    total = max(sum(counts), 1)
    largest = int(np.argmax(found))
    for i, (frequency, count) in enumerate(zip(found.tolist(), counts, strict=True)):
        exact = 1 + Fraction((TOTAL - len(counts)) * count, total)
        rest = len(counts) if sum(counts) else TOTAL
        assert exact - 1 < frequency <= exact + (rest if i == largest else 0)


def make_code_model(width=3, size=40, seed=0):
    """A code model of random tables, without any checkpoint."""
    rng = np.random.default_rng(seed)
    codes = np.unique(rng.integers(-50, 50, (size, width), np.int32), axis=0)
    rng.shuffle(codes)
    counts = rng.integers(1, 1000, len(codes) + 1)
    frequent = np.array([0, 2, -1], np.int32)
    ids, shares, ends = [], [], []
    for context in range((len(frequent) + 2) ** 2):
        own = np.sort(rng.choice(len(codes), min(context % 5, len(codes)), replace=False))
        ids += [*own, -1]
        shares += [*code_models.frequencies(rng.integers(1, 99, len(own) + 1))]
        ends.append(len(ids))
    contexts = code_models.Contexts(frequent, *(np.array(x, np.int32) for x in (ends, ids, shares)))
    digits = rng.integers(0, 99, (width, integers.NUM_SYMBOLS)) // 90
    return CodeModel(
        "none",
        codes.astype(np.int32),
        code_models.frequencies(counts),
        np.stack([code_models.frequencies(row) for row in digits]),
        contexts,
    )


def make_block(model, shape, seed=0, escaped=0.05):
    rng = np.random.default_rng(seed)
    chances = model.frequencies[:-1] / model.frequencies[:-1].sum()
    ids = rng.choice(len(chances), shape, p=chances).astype(np.int32)
    ids[rng.random(shape) < escaped] = len(chances)
    rows = rng.integers(INT32.min, INT32.max, (np.sum(ids == len(chances)), 3), np.int32)
    rows[::2] >>= 24
    return Block(ids, rows)


def information(model, block, with_contexts):
    """Bits of a block under the tables, in float64 and code by code."""
    size = len(model.vocabulary)
    bits = 0.0
    table = model.contexts
    neighbours = len(table.frequent) + 2
    starts = [0, *table.ends]

    def kind(id_):
        found = np.flatnonzero(table.frequent == id_)
        return found[0] if id_ < size and len(found) else len(table.frequent)

    for image in block.ids:
        for (row, column), id_ in np.ndenumerate(image):
            if with_contexts:
                left = kind(image[row, column - 1]) if column else neighbours - 1
                above = kind(image[row - 1, column]) if row else neighbours - 1
                context = left * neighbours + above
                entries = range(starts[context], starts[context + 1])
                own = {int(table.ids[i]): int(table.frequencies[i]) for i in entries}
                bits -= math.log2(own.get(int(id_), own[-1]) / TOTAL)
                if int(id_) in own:
                    continue
            bits -= math.log2(model.frequencies[id_] / TOTAL)
    symbols, _ = integers.split(block.escaped)
    for digit, column in enumerate(symbols.T):
        bits -= np.log2(model.digits[digit][column] / TOTAL).sum()
    return bits + integers.num_low_bits(symbols).sum()


@pytest.mark.parametrize("with_contexts", [False, True])
@pytest.mark.parametrize("shape", [(3, 9, 11), (1, 1, 1), (2, 1, 30), (2, 30, 1)])
def test_blocks_come_back_and_are_as_long_as_the_tables_say(shape, with_contexts):
    model = make_code_model()
    block = make_block(model, shape)
    data = Coder(model).encode(block, with_contexts=with_contexts)
    decoded = Coder(model).decode(data, shape, with_contexts=with_contexts)
    np.testing.assert_array_equal(decoded.ids, block.ids)
    np.testing.assert_array_equal(decoded.escaped, block.escaped)
    expected = information(model, block, with_contexts)
    # The coder ends with whole words of 32 bits.
    assert expected - 8 <= 8 * len(data) <= 1.001 * expected + 64


def test_a_block_may_consist_of_escapes_or_of_one_code():
    model = make_code_model(size=1)
    assert len(model.vocabulary) == 1
    for escaped in (0.0, 1.0):
        block = make_block(model, (4, 5, 5), escaped=escaped)
        data = Coder(model).encode(block, with_contexts=False)
        decoded = Coder(model).decode(data, (4, 5, 5), with_contexts=False)
        np.testing.assert_array_equal(decoded.escaped, block.escaped)


def brute_force(blocks, most_codes):
    """(rows by falling count, counts, rest) of all codes that occur twice at least."""
    rows = np.concatenate([block.reshape(-1, block.shape[-1]) for block in blocks])
    codes, counts = np.unique(rows, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = order[: min(most_codes, int(np.sum(counts > 1)))]
    outside = np.setdiff1d(np.arange(len(codes)), kept)
    return codes[kept], counts[kept], np.repeat(codes[outside], counts[outside], axis=0)


def test_an_estimate_is_a_count():
    rng = np.random.default_rng(0)
    blocks = [np.rint(rng.normal(0, 1.2, (7, 6, 5, 2))).astype(np.int32) for _ in range(3)]
    model = estimate.estimate(blocks, 2, "parameters")
    codes, counts, outside = brute_force(blocks, 1000)
    assert len(outside) > 3
    ours = {
        tuple(code): frequency
        for code, frequency in zip(
            model.vocabulary.tolist(), model.frequencies.tolist(), strict=False
        )
    }
    assert sorted(ours) == sorted(map(tuple, codes.tolist()))
    expected = code_models.frequencies(np.append(counts, len(outside)))
    by_code = dict(zip(map(tuple, codes.tolist()), expected.tolist(), strict=False))
    assert ours == by_code
    assert list(ours.values()) == sorted(ours.values(), reverse=True)
    assert model.frequencies[-1] == expected[-1]
    for digit in range(2):
        symbols = integers.split(outside[:, digit].astype(np.int32)).symbols
        histogram = np.bincount(symbols, minlength=integers.NUM_SYMBOLS)
        np.testing.assert_array_equal(model.digits[digit], code_models.frequencies(histogram))


def test_the_tables_of_contexts_are_counts():
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 3, (5, 6, 7), np.int32) for _ in range(2)]
    model = estimate.estimate(blocks, 1, "parameters")
    ids = {int(code): i for i, (code,) in enumerate(model.vocabulary)}
    pairs = {}
    for image in np.concatenate(blocks):
        for (row, column), code in np.ndenumerate(image):
            left = ids[int(image[row, column - 1])] if column else None
            above = ids[int(image[row - 1, column])] if row else None
            pairs.setdefault((left, above), []).append(ids[int(code)])
    classes = model.contexts.classes(len(model.vocabulary))
    border = classes[-1]
    for (left, above), codes in pairs.items():
        first, second = (border if id_ is None else classes[id_] for id_ in (left, above))
        found, shares = model.contexts.table(int(first * model.contexts.num_classes + second))
        kept, counts = np.unique(codes, return_counts=True)
        kept, counts = kept[counts > 1], counts[counts > 1]
        assert found.tolist() == [*kept.tolist(), -1]
        rest = len(codes) - counts.sum()
        np.testing.assert_array_equal(shares, code_models.frequencies(np.append(counts, rest)))


def test_rare_codes_make_room_for_frequent_ones(monkeypatch):
    """Two codes occur in every block, hundreds once: the table has room for eight."""
    monkeypatch.setattr(estimate, "_MOST_CODES", 2)
    monkeypatch.setattr(estimate, "_MOST_CANDIDATES", 8)
    rare = iter(np.arange(10, 10_000, dtype=np.int32))
    blocks = []
    for _ in range(6):
        block = np.array([1] * 40 + [2] * 30 + [next(rare) for _ in range(30)], np.int32)
        blocks.append(block.reshape(1, 10, 10))
    model = estimate.estimate(blocks, 1, "parameters")
    assert model.vocabulary.tolist() == [[1], [2]]
    np.testing.assert_array_equal(
        model.frequencies, code_models.frequencies(np.array([240, 180, 180]))
    )


def test_a_code_model_is_kept_and_its_damage_is_seen(tmp_path):
    model = make_code_model()
    assert code_models.load(tmp_path, "none") is None
    model.save(tmp_path)
    loaded = code_models.load(tmp_path, "none")
    assert loaded.digest == model.digest
    for name in ("vocabulary", "frequencies", "digits"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
    assert code_models.load(tmp_path, "other") is None
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    randomness = random.Random(0)
    for _ in range(50):
        damaged = bytearray(content)
        damaged[randomness.randrange(len(content))] ^= 1 << randomness.randrange(8)
        path.write_bytes(damaged)
        try:
            found = code_models.load(tmp_path, "none")
        except UserError as error:
            message = str(error)
        else:  # the bit means nothing, e.g. a time
            assert found.digest == model.digest
            continue
        assert f"{path} is damaged" in message
    method = content.index(b"PK\1\2") + 10  # in the zip file's directory
    unknown = bytearray(content)
    unknown[method] = 99
    for damaged in (unknown, content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"code_model.npz is damaged: delete it"):
            code_models.load(tmp_path, "none")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"code_model.npz is damaged: delete it"):
        code_models.load(tmp_path, "none")


QUANTIZERS = tiny.PAPER


@pytest.fixture(scope="module", params=QUANTIZERS)
def model(request):
    """A fresh model with a code model of the tiny training images."""
    created = create_model(tiny.config(request.param))
    if request.param == "dense_lattice":
        created.quantizer.basis[...] *= 1e-4  # as it becomes in training: hardly a code recurs
    codec.fit(created, [tiny.images(70)])
    return created


def test_images_come_back_as_the_model_reconstructs_them(model):
    images = tiny.images(19, 2)
    codes = np.asarray(jax.jit(lambda x: model.encode(x))(images))
    for with_contexts in (False, True):
        stream = codec.encode(model, images, with_contexts=with_contexts)
        np.testing.assert_array_equal(codec.decode_codes(model, stream), codes)
        decoded = codec.decode(model, stream)
        assert decoded.dtype == np.uint8
        expected = np.asarray(jax.jit(lambda x: model.decode_uint8(x))(codes), int)
        # Another batch size may round a pixel to the other side.
        assert np.abs(decoded - expected).max() <= 1
        np.testing.assert_array_equal(codec.decode(model, stream), decoded)


def test_any_code_comes_back(model):
    rng = np.random.default_rng(0)
    shape = codec.decode_codes(model, codec.encode(model, tiny.images(2))).shape
    largest = 2**30 if model.quantizer.code_width > 1 else 511
    codes = rng.integers(-largest, largest, shape, np.int32, endpoint=True)
    codes.reshape(-1)[:5] = [INT32.min, INT32.max, 0, 2**30, -(2**30)]
    for with_contexts in (False, True):
        stream = codec.encode_codes(model, codes, with_contexts=with_contexts)
        np.testing.assert_array_equal(codec.decode_codes(model, stream), codes)
    with pytest.raises(UserError, match="holds codes and no images"):
        codec.decode(model, stream)


def test_a_lattice_of_one_dimension_has_codes_with_a_last_axis():
    model = create_model(tiny.config("sparse_lattice", **{"model.latent_dim": 1}))
    codec.fit(model, [tiny.images(20)])
    codes = np.asarray(model.encode(tiny.images(3)))
    assert codes.shape == (3, 6, 6, 1)
    for with_contexts in (False, True):
        stream = codec.encode_codes(model, codes, with_contexts=with_contexts)
        np.testing.assert_array_equal(codec.decode_codes(model, stream), codes)
    tokens, _ = Vocabulary(model.code_model, model.quantizer).tokens(codes)
    assert tokens.shape == (3, 6, 6)


@pytest.mark.parametrize("size", [(1, 1), (13, 12), (7, 31)])
def test_images_of_any_size_are_padded_and_cropped(size):
    model = create_model(tiny.config("sparse_lattice"))
    codec.fit(model, [tiny.images(20)])
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 1), np.uint8)
    decoded = codec.decode(model, codec.encode(model, image))
    height, width = size
    padded = np.pad(image, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    expected = np.asarray(model.decode_uint8(model.encode(padded)), int)[:, :height, :width]
    assert decoded.shape == image.shape
    assert np.abs(decoded - expected).max() <= 1  # rounding, as above


def test_a_stream_is_what_its_format_says(model):
    images = tiny.images(2)
    for with_contexts in (False, True):
        stream = codec.encode(model, images, with_contexts=with_contexts)
        magic, version, flags, digest, count, height, width, checksum = struct.unpack_from(
            "<4sBB8sIIII", stream
        )
        assert (magic, version, flags) == (b"LLVQ", 1, 1 + 2 * with_contexts)
        assert digest.hex() == codec.code_model_of(model).digest[:16]
        assert (count, height, width) == (2, 12, 12)
        codes = codec.decode_codes(model, stream)
        assert checksum == zlib.crc32(
            stream[:26] + struct.pack("<I", len(stream)) + codes.astype("<i4").tobytes()
        )
        block = Vocabulary(model.code_model, model.quantizer).block(codes)
        payload = Coder(model.code_model).encode(block, with_contexts=with_contexts)
        assert stream[30:] == payload
    assert container.HEADER_BYTES == 30


def test_many_images_make_blocks(model, monkeypatch):
    images = tiny.images(19, 2)
    whole = codec.encode(model, images)
    monkeypatch.setattr(container, "VECTORS_PER_BLOCK", 4 * 36)
    parts = codec.encode(model, images)
    np.testing.assert_array_equal(
        codec.decode(model, parts), codec.decode(model, codec.encode(model, images))
    )
    lengths = [codec.encode(model, images[i : i + 4]) for i in range(0, 19, 4)]
    assert len(parts) == 30 + sum(4 + len(stream) - 30 for stream in lengths)
    assert whole[:26] == parts[:26]
    with pytest.raises(UserError, match="damaged"):
        codec.decode(model, parts[:-1])
    with pytest.raises(UserError, match="damaged"):
        codec.decode(model, parts + b"\0")


@pytest.mark.parametrize("num_devices", [1, 8])
def test_codes_do_not_depend_on_devices_or_batches(model, num_devices):
    data = tiny.dataset()
    expected = Passes(model, jax.devices()[:1]).codes(tiny.images(70))
    passes = Passes(model, jax.devices()[:num_devices])
    np.testing.assert_array_equal(passes.codes(tiny.images(70)), expected)
    one_by_one = [passes.codes(image[None]) for image in tiny.images(70)[:3]]
    np.testing.assert_array_equal(np.concatenate(one_by_one), expected[:3])
    ranges = [range(3), range(50, 61), range(3, 4), range(61, 70)]
    parts = list(passes.of_split(data, "train", ranges))
    for part, wanted in zip(parts, ranges, strict=True):
        np.testing.assert_array_equal(part, expected[wanted.start : wanted.stop])


def test_packed_codes_come_back_in_order():
    model = create_model(tiny.config("dense_lattice", **{"model.image_shape": (16, 16, 1)}))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    expected = np.asarray(jax.jit(lambda x: model.encode(x))(images))
    model.set_attributes(packing=2)
    packed = jax.jit(lambda x: model.encode(model.pack(x)))(images)
    assert packed.shape == (3, 4, 4, 4, 8)
    found = np.asarray(model.unpack_codes(packed))
    # The same sums in another order: a code at a wall may fall to the other side.
    assert found.shape == expected.shape
    assert np.mean(found != expected) < 0.01


def some_model():
    model = create_model(tiny.config("sparse_lattice"))
    codec.fit(model, [tiny.images(70)])
    return model


def test_what_cannot_be_decoded_is_named():
    model = some_model()
    stream = codec.encode(model, tiny.images(3))
    header, rest = stream[:26], stream[26:]
    other = create_model(tiny.config("sparse_lattice", seed=4))
    codec.fit(other, [tiny.images(70)])
    huge = stream[:14] + struct.pack("<III", 1, 2**31, 2**31) + stream[26:]
    long = stream[:14] + struct.pack("<III", 1, 16_000, 16_000) + stream[26:]
    for damaged, words in {
        b"": "does not begin with LLVQ",
        b"\x89PNG" + stream[4:]: "does not begin with LLVQ",
        stream[:20]: "truncated or damaged",
        stream[:4] + b"\2" + stream[5:]: "has version 2 of the format, and this program reads 1",
        stream[:5] + b"\x80" + stream[6:]: "truncated or damaged",
        stream[:-4]: "truncated or damaged",
        stream + b"\1" * 8: "truncated or damaged",
        header + b"\0\0\0\0" + rest[4:]: "truncated or damaged",
        codec.encode(other, tiny.images(3)): "is of another model",
        huge: "cannot hold 1 × 2,147,483,648 × 2,147,483,648 pixels",
        long: "too short",
    }.items():
        with pytest.raises(UserError, match=words):
            codec.decode(model, damaged)
    model.quantizer.basis[...] *= 2
    with pytest.raises(UserError, match="have changed since"):
        codec.decode(model, stream)
    model.code_model = None
    with pytest.raises(UserError, match=r"no code model: evaluate its run"):
        codec.encode(model, tiny.images(3))


def test_a_stream_with_contexts_cannot_claim_what_its_length_cannot_hold():
    """Even where contexts without an entry cost next to nothing before the escape's own cost."""
    model = some_model()
    assert model.code_model.contexts.frequencies.max() == TOTAL
    stream = codec.encode(model, tiny.images(3), with_contexts=True)
    long = stream[:14] + struct.pack("<III", 1, 16_000, 16_000) + stream[26:]
    with pytest.raises(UserError, match="too short"):
        codec.decode(model, long)


def test_equal_value_ranges_have_equal_digests():
    model = some_model()
    before = code_models.parameters_digest(model)
    model.value_range = (np.float32(-0.5), 0.5)
    assert code_models.parameters_digest(model) == before
    model.value_range = (0, 1)
    assert code_models.parameters_digest(model) != before


@pytest.mark.parametrize("codes", [[2.5], [2**31], [np.nan]])
def test_what_are_no_codes_is_refused(codes):
    model = some_model()
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="integers of 32 bits"):
        codec.encode_codes(model, np.full((1, 6, 6, 8), codes))
    with pytest.raises(ValueError, match=r"codes must be \[n, h, w, \*\(8,\)\], not \[1, 6, 6\]"):
        codec.encode_codes(model, np.zeros((1, 6, 6), np.int32))


def test_what_is_no_image_is_refused():
    model = some_model()
    for images in (
        np.zeros((12, 12, 1), np.uint8),
        np.zeros((1, 12, 12, 3), np.uint8),
        np.zeros((1, 12, 12, 1), np.float32),
    ):
        with pytest.raises(ValueError, match=r"images must be uint8 \[n, height, width, 1\]"):
            codec.encode(model, images)
    with pytest.raises(ValueError, match="no pixel"):
        codec.encode(model, np.zeros((0, 12, 12, 1), np.uint8))


@pytest.mark.parametrize("with_contexts", [False, True])
def test_a_mutated_stream_is_refused_or_decodes_to_the_original(with_contexts):
    model = some_model()
    images = tiny.images(3)
    stream = codec.encode(model, images, with_contexts=with_contexts)
    codes = codec.decode_codes(model, stream)
    randomness = random.Random(0)
    num_refused = 0
    for case in range(500):
        mutated = bytearray(stream)
        for _ in range(1 + case % 3):
            kind, place = randomness.randrange(4), randomness.randrange(len(mutated))
            if kind == 0:
                mutated[place] ^= 1 << randomness.randrange(8)
            elif kind == 1:
                mutated[place] = randomness.randrange(256)
            elif kind == 2:
                del mutated[place : place + randomness.randrange(1, 6)]
            else:
                mutated[place:place] = randomness.randbytes(randomness.randrange(1, 6))
        try:
            found = codec.decode_codes(model, bytes(mutated))
        except UserError:
            num_refused += 1
        else:
            np.testing.assert_array_equal(found, codes)
    assert num_refused > 450


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_stream_of_real_images_is_as_long_as_the_tables_say(quantizer):
    """The test images as one stream: within 1% of its cross-entropy, header and all."""
    import input_pipeline

    images = input_pipeline.load("fashion_mnist").resident("test")[:500]
    model = load_pretrained(f"fashion_mnist/{quantizer}")
    stream = codec.encode(model, images)
    codes = codec.decode_codes(model, stream)
    rows = codes.reshape(len(images) * 14 * 14, -1)
    places = {tuple(row): place for place, row in enumerate(model.code_model.vocabulary.tolist())}
    ids = np.array([places.get(tuple(row), len(places)) for row in rows.tolist()])
    parts = integers.split(rows[ids == len(places)])
    bits = -np.log2(model.code_model.frequencies[ids] / TOTAL).sum()
    for table, symbols in zip(model.code_model.digits, parts.symbols.T, strict=True):
        bits -= np.log2(table[symbols] / TOTAL).sum()
    bits += integers.num_low_bits(parts.symbols).sum()
    assert bits - 64 < 8 * len(stream) < 1.01 * bits
    again = codec.encode_codes(model, codes)
    np.testing.assert_array_equal(codec.decode_codes(model, again), codes)
