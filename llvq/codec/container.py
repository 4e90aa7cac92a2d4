"""The container: a stream of bytes that describes its content and carries a checksum.

    offset  bytes  little-endian
         0      4  magic, "LLVQ"
         4      1  version, 1
         5      1  flags: 1 if it holds images rather than codes, 2 if it is coded with contexts
         6      8  start of the code model's digest, which also covers the model's parameters
        14      4  number of images
        18      4  their height, in pixels or, if it holds codes, in codes
        22      4  their width
        26      4  CRC-32 of the bytes before it, of the stream's length in 4 bytes, and of the
                   codes, as int32

The codes follow in blocks of whole images, of at most `VECTORS_PER_BLOCK` vectors unless a single
image has more. If there are several blocks, each has its length in front, in 4 bytes.
"""

import math
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from llvq.codec.code_model import TOTAL, CodeModel
from llvq.errors import DamageError, UserError

MAGIC = b"LLVQ"
VERSION = 1
VECTORS_PER_BLOCK = 2**18
MOST_PIXELS = 2**28

_FIXED = struct.Struct("<4sBB8sIII")
_CHECKSUM = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _FIXED.size + _CHECKSUM.size
_HOLDS_IMAGES, _HAS_CONTEXTS = 1, 2

_DAMAGED = "the stream is truncated or damaged"


class Header(NamedTuple):
    """The content of a stream.

    Attributes:
      holds_images: whether the stream stands for images rather than codes.
      has_contexts: whether neighbours predict a code.
      num_images: the number of images.
      height: the height of each image, in pixels or, if the stream holds codes, in codes.
      width: the width, likewise.
    """

    holds_images: bool
    has_contexts: bool
    num_images: int
    height: int
    width: int


def images_per_block(height: int, width: int) -> int:
    """Returns the number of images in a block; the size of an image is in codes."""
    return max(1, VECTORS_PER_BLOCK // (height * width))


def blocks(images: range, height: int, width: int) -> list[range]:
    """Returns the range of images of each block; the size of an image is in codes."""
    step = images_per_block(height, width)
    return [images[start : start + step] for start in range(0, len(images), step)]


def num_bytes(block_lengths: Iterable[int]) -> int:
    """Computes the length of a stream in bytes from the lengths of its blocks."""
    lengths = list(block_lengths)
    framing = _LENGTH.size * len(lengths) if len(lengths) > 1 else 0
    return HEADER_BYTES + framing + sum(lengths)


def _fixed(header: Header, code_model: CodeModel) -> bytes:
    flags = _HOLDS_IMAGES * header.holds_images | _HAS_CONTEXTS * header.has_contexts
    digest = bytes.fromhex(code_model.digest)[:8]
    return _FIXED.pack(MAGIC, VERSION, flags, digest, *header[2:])


def _checksum(fixed: bytes, num_bytes: int, codes: Int32[np.ndarray, "..."]) -> bytes:
    before = zlib.crc32(fixed + _LENGTH.pack(num_bytes))
    return _CHECKSUM.pack(zlib.crc32(np.ascontiguousarray(codes, "<i4").data, before))


def pack(
    header: Header, code_model: CodeModel, codes: Int32[np.ndarray, "..."], blocks: list[bytes]
) -> bytes:
    """Joins a header and blocks to a stream.

    Args:
      header: the content.
      code_model: the code model behind the blocks.
      codes: all codes, for the checksum.
      blocks: the coded codes.
    """
    fixed = _fixed(header, code_model)
    if len(blocks) > 1:
        blocks = [_LENGTH.pack(len(block)) + block for block in blocks]
    length = HEADER_BYTES + sum(map(len, blocks))
    return b"".join([fixed, _checksum(fixed, length, codes), *blocks])


def read_header(data: bytes, code_model: CodeModel) -> Header:
    """Reads the header of a stream.

    Args:
      data: the stream.
      code_model: the code model that the stream must belong to.

    Raises:
      UserError: if the stream is foreign, has a newer version, belongs to another model, or claims
        more than a stream may hold.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise UserError("the stream is not of this program (it does not begin with LLVQ)")
    if len(data) < HEADER_BYTES:
        raise UserError(_DAMAGED)
    _, version, flags, digest, *sizes = _FIXED.unpack_from(data)
    if version != VERSION:
        raise UserError(
            f"the stream has version {version} of the format, and this program reads {VERSION}: "
            "it is damaged, or needs a newer llvq"
        )
    if digest != bytes.fromhex(code_model.digest)[:8]:
        raise UserError(
            f"the stream is of another model (its digest begins with {digest.hex()}, this model's "
            f"with {code_model.digest[:16]}), or damaged: name the model that encoded it"
        )
    if flags > (_HOLDS_IMAGES | _HAS_CONTEXTS):
        raise UserError(_DAMAGED)
    header = Header(bool(flags & _HOLDS_IMAGES), bool(flags & _HAS_CONTEXTS), *sizes)
    check_size(header)
    return header


def check_size(header: Header) -> None:
    """Raises UserError if a stream would hold nothing, or too much for the memory."""
    if not 0 < math.prod(header[2:]) <= MOST_PIXELS:
        raise UserError(
            f"a stream cannot hold {header.num_images:,} × {header.height:,} × {header.width:,} "
            f"pixels or codes, but 1 to {MOST_PIXELS:,}: encode fewer at a time; a stream that "
            "says so is damaged"
        )


def check_length(block: bytes, code_model: CodeModel, num_vectors: int, has_contexts: bool) -> None:
    """Raises DamageError if a block is too short for its codes, before they take memory."""
    least_bits = _least_bits(code_model.frequencies)
    if has_contexts:
        tables, is_escape = code_model.contexts.frequencies, code_model.contexts.ids == -1
        after_escape = _least_bits(tables[is_escape]) + least_bits
        least_bits = min(_least_bits(tables[~is_escape]), after_escape)
    if len(block) + 4 < num_vectors * least_bits / 8:  # the coder's last word holds less
        raise DamageError("it is too short for the content it claims")


def _least_bits(frequencies: Int32[np.ndarray, "n"]) -> float:
    """Returns the cost in bits of the most frequent entry of tables."""
    return -math.log2(frequencies.max(initial=1) / TOTAL)


def unpack(data: bytes, num_blocks: int) -> list[bytes]:
    """Splits a stream into its blocks.

    Raises:
      DamageError: if the lengths of the blocks contradict that of the stream.
    """
    if num_blocks == 1:
        return [data[HEADER_BYTES:]]
    blocks: list[bytes] = []
    position = HEADER_BYTES
    while position < len(data) and len(blocks) < num_blocks:
        end = position + _LENGTH.size
        if end > len(data):
            raise DamageError("a block is missing")
        (length,) = _LENGTH.unpack(data[position:end])
        position = end + length
        blocks.append(data[end:position])
    if position != len(data) or len(blocks) != num_blocks:
        raise DamageError("its length is not that of its blocks")
    return blocks


def check(data: bytes, header: Header, code_model: CodeModel, codes: np.ndarray) -> None:
    """Raises DamageError if the codes differ from those that were encoded."""
    fixed = _fixed(header, code_model)
    if _checksum(fixed, len(data), codes) != data[_FIXED.size : HEADER_BYTES]:
        raise DamageError("its checksum is wrong")
