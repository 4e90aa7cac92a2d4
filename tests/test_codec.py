"""Codes to bits and back: tables, coder, streams, and what a damaged stream ends in."""

import dataclasses
import math
import random
import struct
import zlib
from fractions import Fraction

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llvq import Codec, checkpointing, load_pretrained, pretrained_index
from llvq.codec import code_model as code_models
from llvq.codec import container, estimate, integers, passes
from llvq.codec.code_model import TOTAL, CodeModel
from llvq.codec.coder import Block, Coder
from llvq.codec.passes import Passes
from llvq.codec.vocabulary import Vocabulary
from llvq.errors import UserError
from tests import tiny
from tests.real_data import needs_files
from tests.runs import create_model, create_state

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
    assert code_models.load(tmp_path) is None
    model.save(tmp_path)
    loaded = code_models.load(tmp_path)
    assert loaded.digest == model.digest
    for name in ("vocabulary", "frequencies", "digits"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    randomness = random.Random(0)
    for _ in range(50):
        damaged = bytearray(content)
        damaged[randomness.randrange(len(content))] ^= 1 << randomness.randrange(8)
        path.write_bytes(damaged)
        try:
            outcome = code_models.load(tmp_path).digest  # the bit means nothing
        except UserError as error:
            outcome = str(error)
        assert outcome == model.digest or f"{path} is damaged" in outcome
    method = content.index(b"PK\1\2") + 10  # in the zip file's directory
    unknown = bytearray(content)
    unknown[method] = 99
    for damaged in (unknown, content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"code_model.npz is damaged: delete it"):
            code_models.load(tmp_path)


@pytest.fixture(scope="module", params=tiny.PAPER)
def codec(request):
    """A codec of a fresh model, fitted to the tiny training images."""
    model = create_model(tiny.config(request.param))
    if request.param == "dense_lattice":
        model.quantizer.basis[...] *= 1e-4  # as it becomes in training: hardly a code recurs
    return Codec.fit(model, tiny.images(70))


@pytest.fixture(scope="module")
def lattice():
    """A codec whose test needs one quantizer only."""
    return Codec.fit(create_model(tiny.config("sparse_lattice")), tiny.images(70))


def test_images_come_back_as_the_model_reconstructs_them(codec):
    images = tiny.images(19, 2)
    codes = np.asarray(jax.jit(lambda x: codec.model.encode(x))(images))
    expected = np.asarray(jax.jit(lambda x: codec.model.decode_uint8(x))(codes), int)
    for contexts in (False, True):
        stream = codec.compress(images, contexts)
        np.testing.assert_array_equal(codec.decompress_codes(stream), codes)
        decoded = codec.decompress(stream)
        assert decoded.dtype == np.uint8
        # Another batch size may round a pixel to the other side.
        assert np.abs(decoded - expected).max() <= 1


def test_any_code_comes_back(codec):
    rng = np.random.default_rng(0)
    shape = codec.decompress_codes(codec.compress(tiny.images(2))).shape
    largest = 2**30 if codec.model.quantizer.code_width > 1 else 511
    codes = rng.integers(-largest, largest, shape, np.int32, endpoint=True)
    codes.reshape(-1)[:5] = [INT32.min, INT32.max, 0, 2**30, -(2**30)]
    for contexts in (False, True):
        stream = codec.compress_codes(codes, contexts)
        np.testing.assert_array_equal(codec.decompress_codes(stream), codes)
    with pytest.raises(UserError, match="holds codes and no images"):
        codec.decompress(stream)


def test_a_lattice_of_one_dimension_has_codes_with_a_last_axis():
    model = create_model(tiny.config("sparse_lattice", **{"model.latent_dim": 1}))
    codec = Codec.fit(model, tiny.images(20))
    codes = np.asarray(model.encode(tiny.images(3)))
    assert codes.shape == (3, 6, 6, 1)
    for contexts in (False, True):
        stream = codec.compress_codes(codes, contexts)
        np.testing.assert_array_equal(codec.decompress_codes(stream), codes)
    tokens, _ = Vocabulary(codec.code_model, model.quantizer).tokens(codes)
    assert tokens.shape == (3, 6, 6)


@pytest.mark.parametrize("size", [(1, 1), (13, 12), (7, 31)])
def test_images_of_any_size_are_padded_and_cropped(size, lattice):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 1), np.uint8)
    decoded = lattice.decompress(lattice.compress(image))
    height, width = size
    padded = np.pad(image, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    model = lattice.model
    expected = np.asarray(model.decode_uint8(model.encode(padded)), int)[:, :height, :width]
    assert decoded.shape == image.shape
    assert np.abs(decoded - expected).max() <= 1  # rounding, as above


def test_arrays_of_any_sizes_are_fitted_to():
    model = create_model(tiny.config("vq"))
    whole = Codec.fit(model, tiny.images(20)).code_model
    parts = Codec.fit(model, iter([tiny.images(20)[:7], tiny.images(20)[7:]])).code_model
    assert parts.digest == whole.digest
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (2, *size, 1), np.uint8) for size in ((12, 12), (6, 30))]
    fitted = Codec.fit(model, arrays).code_model
    codes = np.concatenate([np.asarray(model.encode(images)).reshape(-1) for images in arrays])
    used, counts = np.unique(codes, return_counts=True)
    assert set(fitted.vocabulary[:, 0].tolist()) == set(used[counts > 1].tolist())
    with pytest.raises(ValueError, match="there are no codes"):
        Codec.fit(model, [])


def test_a_codec_keeps_its_parameters():
    """Whatever becomes of the model that it was made of: it changes, or its memory is given up."""
    model = create_model(tiny.config("vq_ema"))
    codec = Codec.fit(model, tiny.images(20))
    images = tiny.images(3)
    stream = codec.compress(images)
    decoded = codec.decompress(stream)
    for array in jax.tree.leaves(nnx.state(model)):
        array.delete()
    assert codec.compress(images) == stream
    np.testing.assert_array_equal(codec.decompress(stream), decoded)
    changed = nnx.clone(codec.model)
    changed.encoder.mix.kernel[...] *= 2
    with pytest.raises(UserError, match=r"have changed since .*: evaluate its run"):
        Codec(changed, codec.code_model)


def test_loading_needs_the_code_model_that_saving_writes(tmp_path):
    config = tiny.config("vq")
    state = create_state(config)
    for name in ("checkpoints/6", "other"):
        checkpointing.save_for_inference(tmp_path / name, state, config)
    with pytest.raises(UserError, match=r"no code model: evaluate its run .* -m llvq.codec fit"):
        Codec.load(tmp_path)
    codec = Codec.fit(load_pretrained(tmp_path), tiny.images(20))
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path / "checkpoints/6")
    assert loaded.code_model.digest == codec.code_model.digest
    assert loaded.compress(tiny.images(1)) == codec.compress(tiny.images(1))
    with pytest.raises(UserError, match="no trained model"):
        Codec.load(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint in"):
        codec.save(tmp_path / "none")
    foreign = dataclasses.replace(codec.code_model, parameters="of another model")
    foreign.save(tmp_path / "other")
    with pytest.raises(UserError, match=r"have changed since .*: evaluate its run"):
        Codec.load(tmp_path / "other")


def test_a_stream_is_what_its_format_says(codec):
    images = tiny.images(2)
    for contexts in (False, True):
        stream = codec.compress(images, contexts)
        magic, version, flags, digest, count, height, width, checksum = struct.unpack_from(
            "<4sBB8sIIII", stream
        )
        assert (magic, version, flags) == (b"LLVQ", 1, 1 + 2 * contexts)
        assert digest.hex() == codec.code_model.digest[:16]
        assert (count, height, width) == (2, 12, 12)
        codes = codec.decompress_codes(stream)
        assert checksum == zlib.crc32(
            stream[:26] + struct.pack("<I", len(stream)) + codes.astype("<i4").tobytes()
        )
        block = Vocabulary(codec.code_model, codec.model.quantizer).block(codes)
        assert stream[30:] == Coder(codec.code_model).encode(block, with_contexts=contexts)


def test_many_images_make_blocks(codec, monkeypatch):
    images = tiny.images(19, 2)
    whole = codec.compress(images)
    decoded = codec.decompress(whole)
    monkeypatch.setattr(container, "VECTORS_PER_BLOCK", 4 * 36)
    parts = codec.compress(images)
    np.testing.assert_array_equal(codec.decompress(parts), decoded)
    lengths = [len(codec.compress(images[i : i + 4])) for i in range(0, 19, 4)]
    assert len(parts) == 30 + sum(4 + length - 30 for length in lengths)
    assert whole[:26] == parts[:26]
    for damaged in (parts[:-1], parts + b"\0"):
        with pytest.raises(UserError, match="damaged"):
            codec.decompress(damaged)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_codes_do_not_depend_on_devices_or_batches(codec, num_devices):
    expected = Passes(codec.model, jax.devices()[:1]).codes(tiny.images(70))
    several = Passes(codec.model, jax.devices()[:num_devices])
    np.testing.assert_array_equal(several.codes(tiny.images(70)), expected)
    ranges = [range(3), range(50, 61), range(3, 4), range(61, 70)]
    parts = list(several.of_split(tiny.dataset(), "train", ranges))
    for part, wanted in zip(parts, ranges, strict=True):
        np.testing.assert_array_equal(part, expected[wanted.start : wanted.stop])


@pytest.mark.parametrize("name", pretrained_index())
def test_single_images_are_coded_as_in_a_batch_but_for_rounding(name, monkeypatch):
    """With batches of 41 images, as outside the tests."""
    monkeypatch.setattr(passes, "_PIXELS_PER_DEVICE", 2**15)
    model = load_pretrained(name)
    images = tiny.images(82).repeat(3, 1).repeat(3, 2).repeat(model.image_channels, 3)[:, :28, :28]
    images ^= np.random.default_rng(0).integers(0, 16, images.shape, np.uint8)
    found = Passes(model, jax.devices()[:1])
    codes = found.codes(images)
    singles = np.concatenate([found.codes(image[None]) for image in images])
    rows, single_rows = (x.reshape(-1, model.quantizer.code_width) for x in (codes, singles))
    assert len(np.unique(rows, axis=0)) > 4
    assert np.mean(np.any(rows != single_rows, axis=-1)) < 1e-3
    pixels = found.images(codes).astype(int)
    differences = np.abs(pixels - np.concatenate([found.images(x[None]) for x in codes]))
    assert differences.max() <= 1
    assert np.mean(differences) < 1e-3


def test_a_stream_that_cannot_be_decoded_is_named(lattice):
    stream = lattice.compress(tiny.images(3))
    other = Codec.fit(create_model(tiny.config("sparse_lattice", seed=4)), tiny.images(70))
    # Contexts without an entry cost next to nothing before the escape's own cost.
    assert lattice.code_model.contexts.frequencies.max() == TOTAL
    with_contexts = lattice.compress(tiny.images(3), contexts=True)

    def claiming(stream, size):
        return stream[:14] + struct.pack("<III", 1, size, size) + stream[26:]

    for damaged, words in {
        b"": "does not begin with LLVQ",
        b"\x89PNG" + stream[4:]: "does not begin with LLVQ",
        stream[:20]: "truncated or damaged",
        stream[:4] + b"\2" + stream[5:]: "has version 2 of the format, and this program reads 1",
        stream[:5] + b"\x80" + stream[6:]: "truncated or damaged",
        stream[:-4]: "truncated or damaged",
        stream + b"\1" * 8: "truncated or damaged",
        stream[:26] + b"\0\0\0\0" + stream[30:]: "truncated or damaged",
        other.compress(tiny.images(3)): "is of another model",
        claiming(stream, 2**31): "cannot hold 1 × 2,147,483,648 × 2,147,483,648 pixels",
        claiming(stream, 16_000): "too short",
        claiming(with_contexts, 16_000): "too short",
    }.items():
        with pytest.raises(UserError, match=words):
            lattice.decompress(damaged)


def test_equal_value_ranges_have_equal_digests():
    model = create_model(tiny.config("sparse_lattice"))
    before = code_models.parameters_digest(model)
    model.value_range = (np.float32(-0.5), 0.5)
    assert code_models.parameters_digest(model) == before
    model.value_range = (0, 1)
    assert code_models.parameters_digest(model) != before


@pytest.mark.parametrize("codes", [[2.5], [2**31], [np.nan]])
def test_what_are_no_codes_is_refused(codes, lattice):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="integers of 32 bits"):
        lattice.compress_codes(np.full((1, 6, 6, 8), codes))
    with pytest.raises(ValueError, match=r"codes must be \[n, h, w, \*\(8,\)\], not \[1, 6, 6\]"):
        lattice.compress_codes(np.zeros((1, 6, 6), np.int32))


def test_what_is_no_image_is_refused(lattice):
    for images in (
        np.zeros((12, 12, 1), np.uint8),
        np.zeros((1, 12, 12, 3), np.uint8),
        np.zeros((1, 12, 12, 1), np.float32),
    ):
        with pytest.raises(ValueError, match=r"images must be uint8 \[n, height, width, 1\]"):
            lattice.compress(images)
    with pytest.raises(ValueError, match="no pixel"):
        lattice.compress(np.zeros((0, 12, 12, 1), np.uint8))


@pytest.mark.parametrize("contexts", [False, True])
def test_a_mutated_stream_is_refused_or_decodes_to_the_original(contexts, lattice):
    stream = lattice.compress(tiny.images(3), contexts)
    codes = lattice.decompress_codes(stream)
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
            found = lattice.decompress_codes(bytes(mutated))
        except UserError:
            num_refused += 1
        else:
            np.testing.assert_array_equal(found, codes)
    assert num_refused > 450


@pytest.mark.slow
@needs_files
@pytest.mark.parametrize("quantizer", tiny.PAPER)
def test_a_stream_of_real_images_is_as_long_as_the_tables_say(quantizer):
    """The test images as one stream: within 1% of its cross-entropy, header and all."""
    import input_pipeline

    images = input_pipeline.load("fashion_mnist").resident("test")[:500]
    codec = Codec.load(f"fashion_mnist/{quantizer}")
    stream = codec.compress(images)
    codes = codec.decompress_codes(stream)
    rows = codes.reshape(len(images) * 14 * 14, -1)
    places = {tuple(row): place for place, row in enumerate(codec.code_model.vocabulary.tolist())}
    ids = np.array([places.get(tuple(row), len(places)) for row in rows.tolist()])
    block = Block(ids.reshape(codes.shape[:3]), rows[ids == len(places)])
    bits = information(codec.code_model, block, with_contexts=False)
    assert bits - 64 < 8 * len(stream) < 1.01 * bits
    again = codec.compress_codes(codes)
    np.testing.assert_array_equal(codec.decompress_codes(again), codes)
