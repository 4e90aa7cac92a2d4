"""Turns codes into bits and back under a code model, with constriction's range coder.

The coder rounds the probabilities of a model to integers of 24 bits. Those here are multiples of
2⁻²⁰, whose sums are exact in floating point, so that every machine gets the same integers.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from constriction import stream
from jaxtyping import Int32

from llvq.codec import integers
from llvq.codec.code_model import TOTAL, CodeModel
from llvq.errors import DamageError

_BITS_AT_ONCE = 16


class Block(NamedTuple):
    """The codes of some images of one size.

    Attributes:
      ids: the id of each code; the vocabulary's size stands for a code that the vocabulary lacks.
      escaped: the codes that the vocabulary lacks, in order.
    """

    ids: Int32[np.ndarray, "n height width"]
    escaped: Int32[np.ndarray, "escaped code_width"]


def _model(frequencies: Int32[np.ndarray, "n"]) -> stream.model.Categorical:
    return stream.model.Categorical(frequencies / TOTAL, perfect=False)


@functools.cache
def _uniform(num_bits: int) -> stream.model.Uniform:
    return stream.model.Uniform(2**num_bits)


def _pieces(num_bits: int) -> Iterator[tuple[int, int]]:
    """Yields the pieces in which a number of bits is coded, as (position, length)."""
    for position in range(0, num_bits, _BITS_AT_ONCE):
        yield position, min(_BITS_AT_ONCE, num_bits - position)


class _Context(NamedTuple):
    """The entries of a context.

    Attributes:
      ids: the ids that have an entry, and last −1, the escape.
      places: each id's place among the entries; the escape's place for an id without an entry.
      model: the entries' probabilities; None if the escape is the only entry and costs nothing.
    """

    ids: Int32[np.ndarray, "entries"]
    places: Int32[np.ndarray, "codes+1"]
    model: stream.model.Categorical | None


class Coder:
    """Encodes and decodes blocks."""

    def __init__(self, code_model: CodeModel) -> None:
        """Makes constriction's models of the tables.

        Args:
          code_model: the cost of each code.
        """
        self._contexts = code_model.contexts
        self._escape = len(code_model.vocabulary)
        self._classes = self._contexts.classes(self._escape)
        self._ids = _model(code_model.frequencies)
        self._digits = [_model(table) for table in code_model.digits]
        self._context = functools.cache(self._make_context)

    def _make_context(self, context: int) -> _Context:
        ids, frequencies = self._contexts.table(context)
        places = np.full(self._escape + 1, len(ids) - 1, np.int32)
        places[ids[:-1]] = np.arange(len(ids) - 1)
        return _Context(ids, places, _model(frequencies) if len(ids) > 1 else None)

    def encode(self, block: Block, *, with_contexts: bool) -> bytes:
        """Encodes a block to bits.

        Args:
          block: the codes.
          with_contexts: whether neighbours predict a code; takes longer.
        """
        encoder = stream.queue.RangeEncoder()
        if with_contexts:
            ids = block.ids
            padded = np.pad(ids, ((0, 0), (1, 0), (1, 0)), constant_values=-1)
            for places, groups in self._diagonals(ids.shape, padded):
                diagonal = ids[places]
                for context, members in groups:
                    entries, own = self._context(context), diagonal[members]
                    symbols = entries.places[own]
                    if entries.model:
                        encoder.encode(symbols, entries.model)
                    if len(rest := own[symbols == len(entries.ids) - 1]):
                        encoder.encode(rest, self._ids)
        elif block.ids.size:
            encoder.encode(block.ids.reshape(-1), self._ids)
        symbols, low = integers.split(block.escaped)
        if symbols.size:
            for column, model in zip(symbols.T, self._digits, strict=True):
                encoder.encode(np.ascontiguousarray(column), model)
            for num_bits, own_bits in _by_low_bits(symbols):
                for position, length in _pieces(num_bits):
                    piece = low[own_bits] >> np.uint32(position) & np.uint32(2**length - 1)
                    encoder.encode(piece.astype(np.int32), _uniform(length))
        return encoder.get_compressed().astype("<u4").tobytes()

    def decode(self, data: bytes, shape: tuple[int, int, int], *, with_contexts: bool) -> Block:
        """Decodes bits to a block.

        Args:
          data: the result of `encode`.
          shape: the shape of the ids.
          with_contexts: as for `encode`.

        Raises:
          DamageError: if `encode` cannot have made the bits.
        """
        if len(data) % 4:
            raise DamageError("its length is impossible")
        decoder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        try:
            ids = self._decode_ids(decoder, shape, with_contexts)
            escaped = self._decode_escaped(decoder, int(np.sum(ids == self._escape)))
        except (AssertionError, ValueError) as error:  # by constriction and `integers.join`
            raise DamageError(str(error)) from error
        if not decoder.maybe_exhausted():
            raise DamageError("bits are left over")
        return Block(ids, escaped)

    def _decode_ids(
        self, decoder: stream.queue.RangeDecoder, shape: tuple[int, int, int], with_contexts: bool
    ) -> Int32[np.ndarray, "n height width"]:
        if not with_contexts:
            size = int(np.prod(shape))
            return decoder.decode(self._ids, size).reshape(shape) if size else np.empty(shape, int)
        n, height, width = shape
        padded = np.full((n, height + 1, width + 1), -1, np.int32)
        ids = padded[:, 1:, 1:]
        for places, groups in self._diagonals(shape, padded):
            diagonal = np.full(len(places[0]), -1, np.int32)
            for context, members in groups:
                entries, found = self._context(context), diagonal[members]  # a view
                if entries.model:
                    found[:] = entries.ids[decoder.decode(entries.model, len(found))]
                if num_escaped := int(np.sum(found < 0)):
                    found[found < 0] = decoder.decode(self._ids, num_escaped)
            ids[places] = diagonal
        return np.ascontiguousarray(ids)

    def _diagonals(
        self, shape: tuple[int, int, int], padded: Int32[np.ndarray, "n height+1 width+1"]
    ) -> Iterator[tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[tuple[int, slice]]]]:
        """Yields the order of coding with contexts: by diagonals, and within one by contexts.

        The neighbours of a diagonal's codes are in the diagonal before it.

        Args:
          shape: the shape of the ids.
          padded: the ids, with a border of −1 to the left and above. A diagonal is read only when
            the next one is requested, so that a decoder can fill it in the meantime.

        Yields:
          (places, groups): the places of the diagonal in all images, ordered by context, and for
          each context a group (context, slice of these places).
        """
        n, height, width = shape
        num_classes = self._contexts.num_classes
        for diagonal in range(height + width - 1):
            rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
            images, rows = (x.reshape(-1) for x in np.meshgrid(np.arange(n), rows, indexing="ij"))
            columns = diagonal - rows
            left = self._classes[padded[images, rows + 1, columns]]
            above = self._classes[padded[images, rows, columns + 1]]
            contexts = left * num_classes + above
            order = np.argsort(contexts.astype(np.uint16), kind="stable")  # a radix sort
            found, starts = np.unique(contexts[order], return_index=True)
            ends = [*starts[1:].tolist(), len(order)]
            members = map(slice, starts.tolist(), ends)
            groups = list(zip(found.tolist(), members, strict=True))
            yield (images[order], rows[order], columns[order]), groups

    def _decode_escaped(
        self, decoder: stream.queue.RangeDecoder, count: int
    ) -> Int32[np.ndarray, "escaped code_width"]:
        if not count:
            return np.empty((0, len(self._digits)), np.int32)
        symbols = np.stack([decoder.decode(model, count) for model in self._digits], axis=1)
        low = np.zeros(symbols.shape, np.uint32)
        for num_bits, places in _by_low_bits(symbols):
            for position, length in _pieces(num_bits):
                piece = decoder.decode(_uniform(length), int(np.sum(places)))
                low[places] |= piece.astype(np.uint32) << np.uint32(position)
        return integers.join(integers.Parts(symbols, low))


def _by_low_bits(
    symbols: Int32[np.ndarray, "escaped code_width"],
) -> Iterator[tuple[int, np.ndarray]]:
    """Groups the symbols that bits follow by the number of these bits: (number, places)."""
    follow = integers.num_low_bits(symbols)
    for num_bits in np.unique(follow):
        if num_bits:
            yield int(num_bits), follow == num_bits
