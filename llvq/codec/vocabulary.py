"""Maps codes to ids in a vocabulary and back."""

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt64

from llvq.codec.code_model import CodeModel
from llvq.codec.coder import Block
from llvq.quantizers import Quantizer
from llvq.usage.counting import keys

_NEAREST_AT_ONCE = 1024
_AT_ONCE = 2**14  # so that the copies that JAX makes fit the processor's cache


@jax.jit
def _look_up(
    codes: Int[Array, "n width"],
    ascending: UInt64[Array, "codes"],
    order: Int32[Array, "codes"],
    rows: Int32[Array, "codes width"],
) -> Int32[Array, "n"]:
    """Looks up the id of each code; `ascending` has the vocabulary's keys, `order` their ids."""
    with jax.enable_x64(True):
        place = jnp.searchsorted(ascending, keys(codes)).astype(jnp.int32)
    candidate = order.at[place].get(mode="clip")
    # Two codes may share a fingerprint, so the whole code is compared.
    is_same = jnp.all(rows[candidate] == codes, axis=-1)
    return jnp.where(is_same, candidate, len(rows))


@jax.jit
def _nearest(
    vectors: Float[Array, "n latent_dim"], entries: Float[Array, "codes latent_dim"]
) -> Int32[Array, "n"]:
    products = jnp.matmul(vectors, entries.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(entries**2, axis=1) - 2 * products, axis=1).astype(jnp.int32)


class Vocabulary:
    """The vocabulary of a code model.

    Attributes:
      codes: the codes, by id.
      size: the number of codes.
      width: the number of integers in a code.
    """

    def __init__(self, code_model: CodeModel, quantizer: Quantizer) -> None:
        """Sorts the codes for look-ups.

        Args:
          code_model: the code model with the vocabulary.
          quantizer: the quantizer behind the codes.
        """
        self.codes = code_model.vocabulary
        self.size, self.width = self.codes.shape
        self._quantizer = quantizer
        entries = np.asarray(keys(self.codes))
        order = np.argsort(entries, kind="stable")
        with jax.enable_x64(True):
            self._keys, self._order = jnp.asarray(entries[order]), jnp.asarray(order, jnp.int32)
        self._rows = jnp.asarray(self.codes)

    def ids(
        self, codes: Int[np.ndarray, "n height width ..."]
    ) -> Int32[np.ndarray, "n height width"]:
        """Looks up the id of each code; `size` stands for a code that the vocabulary lacks."""
        rows = codes.reshape(-1, self.width)
        ids = np.empty(len(rows), np.int32)
        for start in range(0, len(rows), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            ids[some] = _look_up(rows[some], self._keys, self._order, self._rows)
        return ids.reshape(codes.shape[:3])

    def block(self, codes: Int[np.ndarray, "n height width ..."]) -> Block:
        """Replaces codes by ids; those that the vocabulary lacks stay beside them."""
        ids = self.ids(codes)
        is_escaped = ids.reshape(-1) == self.size
        rows = codes.reshape(-1, self.width)
        return Block(ids, rows[is_escaped] if is_escaped.any() else rows[:0])

    def tokens(
        self, codes: Int32[np.ndarray, "n height width ..."]
    ) -> tuple[Int32[np.ndarray, "n height width"], int]:
        """Looks up the id of each code or, if the vocabulary lacks it, of the nearest entry.

        Returns:
          (ids, number of codes that the vocabulary lacks).
        """
        block = self.block(codes)
        tokens, num_outside = block.ids.copy(), len(block.escaped)
        entries = self._vectors(self.codes)
        nearest = []
        for start in range(0, num_outside, _NEAREST_AT_ONCE):
            rows = block.escaped[start : start + _NEAREST_AT_ONCE]
            rows = np.pad(rows, ((0, _NEAREST_AT_ONCE - len(rows)), (0, 0)))
            nearest.append(np.asarray(_nearest(self._vectors(rows), entries)))
        if nearest:
            tokens[tokens == self.size] = np.concatenate(nearest)[:num_outside]
        return tokens, num_outside

    def _vectors(self, rows: Int32[np.ndarray, "n width"]) -> Float[Array, "n latent_dim"]:
        return self._quantizer.lookup(jnp.asarray(rows.reshape(-1, *self._quantizer.code_shape)))

    def codes_of(self, block: Block) -> Int32[np.ndarray, "n height width ..."]:
        """Replaces the ids of a block by codes."""
        rows = np.take(self.codes, block.ids, axis=0, mode="clip")
        rows[block.ids == self.size] = block.escaped
        return rows.reshape(*block.ids.shape, *self._quantizer.code_shape)
