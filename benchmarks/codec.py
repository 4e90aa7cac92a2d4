r"""Speed and rate of the codec on one core, next to zlib's and zstd's.

    python benchmarks/codec.py [--quantizers vq sparse_lattice] [--images=10000] [--repeats=7] \
        [--output=results/codec.json]

Needs FashionMNIST and zstandard: pip install -r benchmarks/requirements.txt. It measures the codes
of the test images under the project's models, in three parts, there and back:

- codes and ids: int32 codes to ids of the vocabulary, for a lattice by their fingerprints.
- ids and bits: these ids to bits under the code model's tables, at order 0 (no code depends on its
  neighbours) and with contexts. zlib and zstd compress the same blocks: ids of one or two bytes,
  then the integers of the codes that the vocabulary lacks.
- codes and stream: all that `Codec.compress_codes` and `Codec.decompress_codes` do.

The cross-entropy is what the tables say that the codes cost: with an ideal coder, and without any
header. The process is pinned to a single core, where the system allows that, and keeps freed
memory, as main.py does (llvq/runtime/host_memory.py). Times are medians of runs in turns; what
comes back is compared with what was encoded.
"""

import argparse
import functools
import importlib.util
import math
import os
import pathlib
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# One CPU core is measured, whatever else the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from jaxtyping import Float, Int32

from benchmarks import comparison, measure, store
from benchmarks.store import Row
from llvq.codec import Codec, container, integers
from llvq.codec.code_model import TOTAL, CodeModel
from llvq.codec.coder import Block, Coder
from llvq.codec.passes import Passes
from llvq.codec.vocabulary import Vocabulary
from llvq.errors import UserError, one_line_exit
from llvq.quantizers import QUANTIZERS
from llvq.runtime import host_memory
from llvq.runtime.console import markdown_table

PROGRAM = "codec.py"

_ZSTD_LEVELS = (3, 19)
_IDENTITY = ("machine", "model", "vectors", "between", "by")
_CODERS = {"llvq, order 0": False, "llvq, with contexts": True}

Codes = Int32[np.ndarray, "n height width ..."]


class Coded(NamedTuple):
    """Codes as bytes.

    Attributes:
      data: the bytes.
      shape: of the codes' ids.
    """

    data: bytes
    shape: tuple[int, int, int]


class Way(NamedTuple):
    """A way to encode something and to decode it.

    Attributes:
      between: which part of the codec it is.
      by: what encodes.
      items: what to encode, one by one: codes or blocks.
      encode: encodes an item; to `Coded` where bits are made.
      decode: makes the item again of what `encode` returned.
      cross_entropy: bits of all items under the tables; None where the row shows none.
    """

    between: str
    by: str
    items: Sequence[Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    cross_entropy: float | None = None


def cross_entropy(code_model: CodeModel, block: Block, *, with_contexts: bool) -> float:
    """Returns the bits that a block costs under the tables."""
    costs = _costs(code_model.frequencies)
    if with_contexts:
        bits = _bits_in_context(code_model, block.ids, costs)
    else:
        bits = float(costs[block.ids].sum())
    symbols, _ = integers.split(block.escaped)
    digits = np.take_along_axis(_costs(code_model.digits), symbols.T, axis=1)
    return bits + float(digits.sum()) + int(integers.num_low_bits(symbols).sum())


def _costs(frequencies: Int32[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return -np.log2(frequencies / TOTAL)


def _bits_in_context(
    code_model: CodeModel,
    ids: Int32[np.ndarray, "n height width"],
    costs: Float[np.ndarray, "codes+1"],
) -> float:
    """Returns the bits of ids given their neighbours; one without an entry also costs `costs`."""
    tables, size = code_model.contexts, len(code_model.vocabulary)
    padded = np.pad(ids, ((0, 0), (1, 0), (1, 0)), constant_values=-1)
    classes = tables.classes(size)[padded]
    contexts = classes[:, 1:, :-1] * tables.num_classes + classes[:, :-1, 1:]
    bits = 0.0
    for context in np.unique(contexts):
        entries, frequencies = tables.table(int(context))
        *own, escape = _costs(frequencies)
        in_context = escape + costs
        in_context[entries[:-1]] = own
        bits += float(in_context[ids[contexts == context]].sum())
    return bits


def _coder_way(code_model: CodeModel, blocks: Sequence[Block], by: str) -> Way:
    coder, with_contexts = Coder(code_model), _CODERS[by]

    def encode(block: Block) -> Coded:
        return Coded(coder.encode(block, with_contexts=with_contexts), block.ids.shape)

    def decode(coded: Coded) -> Block:
        return coder.decode(*coded, with_contexts=with_contexts)

    bits = sum(cross_entropy(code_model, block, with_contexts=with_contexts) for block in blocks)
    return Way("ids and bits", by, blocks, encode, decode, bits)


def _general_way(
    blocks: Sequence[Block],
    num_ids: int,
    by: str,
    compress: Callable[[bytes], bytes],
    decompress: Callable[[bytes], bytes],
) -> Way:
    """Applies a compressor of bytes to ids, each in the fewest bytes that hold `num_ids` values."""
    dtype = np.min_scalar_type(num_ids - 1).newbyteorder("<")

    def encode(block: Block) -> Coded:
        data = block.ids.astype(dtype).tobytes() + block.escaped.astype("<i4").tobytes()
        return Coded(compress(data), block.ids.shape)

    def decode(coded: Coded) -> Block:
        data, size = decompress(coded.data), math.prod(coded.shape)
        ids = np.frombuffer(data, dtype, size).astype(np.int32)
        escaped = np.frombuffer(data[size * dtype.itemsize :], "<i4")
        width = blocks[0].escaped.shape[1]
        return Block(ids.reshape(coded.shape), escaped.reshape(-1, width))

    return Way("ids and bits", by, blocks, encode, decode)


def _stream_way(codec: Codec, codes: Codes, by: str) -> Way:
    def encode(codes: Codes) -> Coded:
        return Coded(codec.compress_codes(codes, _CODERS[by]), codes.shape[:3])

    def decode(coded: Coded) -> Codes:
        return codec.decompress_codes(coded.data)

    return Way("codes and stream", by, [codes], encode, decode)


def ways(codec: Codec, codes: Codes) -> Iterator[Way]:
    """Yields every way to measure with a codec.

    Args:
      codec: made the codes.
      codes: of some images.
    """
    import zstandard

    vocabulary = Vocabulary(codec.code_model, codec.model.quantizer)
    ranges = container.blocks(range(len(codes)), *codes.shape[1:3])
    parts = [codes[images.start : images.stop] for images in ranges]
    blocks = [vocabulary.block(part) for part in parts]
    yield Way("codes and ids", "llvq", parts, vocabulary.block, vocabulary.codes_of)
    for by in _CODERS:
        yield _coder_way(codec.code_model, blocks, by)
    general = functools.partial(_general_way, blocks, vocabulary.size + 1)
    yield general("zlib, level 6", functools.partial(zlib.compress, level=6), zlib.decompress)
    for level in _ZSTD_LEVELS:
        compress = zstandard.ZstdCompressor(level).compress
        yield general(f"zstd, level {level}", compress, zstandard.ZstdDecompressor().decompress)
    for by in _CODERS:
        yield _stream_way(codec, codes, by)


def load(name: str, num_images: int) -> tuple[Codec, Codes]:
    """Loads the codec of a shipped model, and encodes FashionMNIST's test images."""
    import input_pipeline

    codec = Codec.load(name)
    data: Any = input_pipeline.load("fashion_mnist")  # whose images are in memory
    return codec, Passes(codec.model).codes(data.resident("test")[:num_images])


def _repeat(convert: Callable[[Any], Any], items: Sequence[Any]) -> measure.Run:
    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            for item in items:
                convert(item)

    return run


def _is_same(a: Any, b: Any) -> bool:
    """Says whether two lists of codes or blocks are equal."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def _measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Measures all ways of a model."""
    codec, codes = load(name, options.images)
    num_vectors = math.prod(codes.shape[:3])
    rows: list[Row] = []
    runs: dict[str, measure.Run] = {}
    for number, way in enumerate(ways(codec, codes)):
        encoded = [way.encode(item) for item in way.items]
        if not _is_same([way.decode(x) for x in encoded], way.items):
            raise AssertionError(f"{way.between} by {way.by}: something else comes back")
        runs[f"encode {number}"] = _repeat(way.encode, way.items)
        runs[f"decode {number}"] = _repeat(way.decode, encoded)
        row: Row = {"model": name, "vectors": num_vectors, "between": way.between, "by": way.by}
        row["bits_per_vector"] = row["cross_entropy"] = None
        if isinstance(encoded[0], Coded):
            row["bits_per_vector"] = 8 * sum(len(x.data) for x in encoded) / num_vectors
        if way.cross_entropy is not None:
            row["cross_entropy"] = way.cross_entropy / num_vectors
        rows.append(row)
    times = measure.interleave(runs, options.repeats, options.min_seconds)
    for number, row in enumerate(rows):
        row["seconds"] = {what: times[f"{what} {number}"] for what in ("encode", "decode")}
    return rows


def table(rows: Sequence[Row]) -> str:
    """Makes a table of all rows."""
    header = ["model", "vectors", "between", "by", "million codes/s encoded", "decoded"]
    lines = []
    for row in rows:
        line = [row["model"], f"{row['vectors']:,}", row["between"], row["by"]]
        for what in ("encode", "decode"):
            line.append(f"{row['vectors'] / statistics.median(row['seconds'][what]) / 1e6:.3g}")
        bits = (row["bits_per_vector"], row["cross_entropy"])
        lines.append([*line, *("" if x is None else f"{x:.3f}" for x in bits)])
    return markdown_table([*header, "bits per vector", "cross-entropy"], lines)


_HEADER = """# The codec on one core

benchmarks/codec.py wrote this page and says what is measured; do not edit it by hand.
"""


def _report(rows: Sequence[Row]) -> str:
    sections = [_HEADER]
    for where, part in store.by_source(rows):
        cores = "one core" if all(row["is_pinned"] for row in part) else "all cores"
        load = max(row["load"] for row in part)
        sections.append(
            f"\n    {where['command']}\n\n{cores} of {where['machine']}; {where['versions']}; "
            f"load average before: {load:.1f}\n\n{table(part)}\n"
        )
    return "".join(sections)


def _pin_to_one_core() -> bool:
    """Pins the process to one core, if the system can; call it before JAX starts its threads."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = comparison.make_parser(PROGRAM, __doc__)
    default = ["vq", "sparse_lattice"]
    parser.add_argument("--quantizers", nargs="+", choices=list(QUANTIZERS), default=default)
    parser.add_argument("--images", type=int, default=10_000, help="of the test split, at most")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    host_memory.keep_freed_memory()  # as main.py does
    options = _parse(arguments)
    with one_line_exit(PROGRAM):
        if importlib.util.find_spec("zstandard") is None:
            raise UserError('zstandard is not installed: pip install "zstandard>=0.25,<0.26"')
        comparison.check_options(options, "images")
        kept = store.Store(options.output, _report, _IDENTITY)
        facts: Row = {"load": os.getloadavg()[0], "is_pinned": _pin_to_one_core()}
        facts |= store.source(PROGRAM, "jax", "numpy", "constriction", "zstandard")
        measured: list[Row] = []
        for quantizer in store.progress(options.quantizers, str):
            rows = [{**facts, **row} for row in _measure(f"fashion_mnist/{quantizer}", options)]
            measured += rows
            kept.add(*rows)
        print(table(measured))


if __name__ == "__main__":
    main()
