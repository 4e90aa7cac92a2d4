"""Code models: the cost of each code, as integer frequency tables beside a checkpoint.

A code that occurs often in the training split is an entry of the vocabulary and has a frequency of
its own. Any other code is escaped: it costs the escape's frequency and then, integer by integer,
the frequency in the table for its position (see `integers`). All frequencies are integers, and
those of a table sum to `TOTAL`, so that every machine has the same model.
"""

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, Int64

from llvq.checkpointing.integrity import digests
from llvq.data.files import writing
from llvq.errors import UserError
from llvq.models import VQVAE, factory

TOTAL = 2**20
_FILE = "code_model.npz"

# Reading a damaged file may raise any of these.
_DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError),
    *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error),
)


def parameters_digest(model: VQVAE) -> str:
    """Hashes everything that a model's codes and images depend on: parameters and value range."""
    _, params, statistics = factory.split(model)
    value_range = list(map(float, model.value_range))  # 0 and 0.0 are equal
    parts = digests({"params": params, "statistics": statistics}, value_range, None)
    return "".join(parts[name][:16] for name in ("params", "statistics", "config"))


def frequencies(counts: Int64[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
    """Scales counts to integers of at least 1 that sum to TOTAL.

    Args:
      counts: numbers of at least 0; at most TOTAL of them.
    """
    counts = counts.astype(object)  # Python's integers: the product would overflow
    free = TOTAL - len(counts)
    whole = max(int(counts.sum()), 1)
    shares = np.array([1 + free * count // whole for count in counts], np.int32)
    shares[np.argmax(shares)] += TOTAL - shares.sum()
    return shares


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """Tables for a code given the codes to its left and above.

    A neighbour counts by its class: one of the frequent codes, another code, or none at the
    border. A context's table has entries for the codes seen often in it, and an escape to the table
    without context.

    Attributes:
      frequent: the id of each frequent code; −1 for a class without one.
      ends: the end of each context's entries in the arrays below; the number of a context is
        left · num_classes + above.
      ids: the codes of the entries; the last entry of each context is the escape, −1.
      frequencies: the frequencies of the entries; those of a context sum to TOTAL.
    """

    frequent: Int32[np.ndarray, "classes-2"]
    ends: Int32[np.ndarray, "contexts"]
    ids: Int32[np.ndarray, "entries"]
    frequencies: Int32[np.ndarray, "entries"]

    @property
    def num_classes(self) -> int:
        """The number of classes of neighbours."""
        return len(self.frequent) + 2

    def classes(self, vocabulary_size: int) -> Int32[np.ndarray, "codes+2"]:
        """Maps ids to classes: each code's, the escape's (vocabulary_size), the border's (−1)."""
        classes = np.full(vocabulary_size + 2, len(self.frequent), np.int32)
        has_code = self.frequent >= 0
        classes[self.frequent[has_code]] = np.flatnonzero(has_code)
        classes[-1] = len(self.frequent) + 1
        return classes

    def table(self, context: int) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
        """Returns (ids, frequencies) of a context's entries."""
        entries = slice(self.ends[context - 1] if context else 0, self.ends[context])
        return self.ids[entries], self.frequencies[entries]


@dataclasses.dataclass(frozen=True, eq=False)
class CodeModel:
    """The cost of each code.

    Attributes:
      parameters: the digest of the parameters that made the codes; see `parameters_digest`.
      vocabulary: the codes with an entry, by falling count.
      frequencies: the frequencies of these entries and, last, of the escape.
      digits: the frequencies of `integers`' symbols, for each integer of an escaped code.
      contexts: the tables for codes given their neighbours.
      source: describes the images behind the estimate; not part of the digest.
    """

    parameters: str
    vocabulary: Int32[np.ndarray, "codes width"]
    frequencies: Int32[np.ndarray, "codes+1"]
    digits: Int32[np.ndarray, "width symbols"]
    contexts: Contexts
    source: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the tables, in hexadecimal, independent of how they are stored."""
        whole = hashlib.sha256(self.parameters.encode())
        for name, array in sorted(self._arrays().items()):
            whole.update(f"{name} {array.shape}".encode())
            whole.update(array.astype("<i4").tobytes())
        return whole.hexdigest()

    @property
    def num_table_bytes(self) -> int:
        """The compressed size of the tables without contexts, in bytes."""
        arrays = (self.vocabulary, self.frequencies, self.digits)
        return sum(len(zlib.compress(array.astype("<i4").tobytes(), 9)) for array in arrays)

    def belongs_to(self, model: VQVAE) -> bool:
        """Tells whether the codes behind the estimate were made with a model's parameters."""
        return self.parameters == parameters_digest(model)

    def _arrays(self) -> dict[str, Int32[np.ndarray, "..."]]:
        return {
            "vocabulary": self.vocabulary,
            "frequencies": self.frequencies,
            "digits": self.digits,
            "context_frequent": self.contexts.frequent,
            "context_ends": self.contexts.ends,
            "context_ids": self.contexts.ids,
            "context_frequencies": self.contexts.frequencies,
        }

    def save(self, checkpoint: epath.PathLike) -> None:
        """Writes the code model into a checkpoint's directory.

        Raises:
          UserError: if it cannot be written.
        """
        buffer = io.BytesIO()
        about = {"parameters": self.parameters, "digest": self.digest, "source": self.source}
        arrays: dict[str, Any] = {"about": json.dumps(about), **self._arrays()}
        np.savez_compressed(buffer, **arrays)
        with writing(epath.Path(checkpoint) / _FILE) as file:
            file.write_bytes(buffer.getvalue())


def load(checkpoint: epath.PathLike) -> CodeModel | None:
    """Reads the code model in a checkpoint's directory, if there is one.

    It may belong to other parameters than the checkpoint's; see `CodeModel.belongs_to`.

    Raises:
      UserError: if it is damaged.
    """
    path = epath.Path(checkpoint) / _FILE
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            about: dict[str, Any] = json.loads(str(arrays["about"]))
            found = CodeModel(
                about["parameters"],
                arrays["vocabulary"],
                arrays["frequencies"],
                arrays["digits"],
                Contexts(
                    arrays["context_frequent"],
                    arrays["context_ends"],
                    arrays["context_ids"],
                    arrays["context_frequencies"],
                ),
                about.get("source", ""),
            )
        is_sound = found.digest == about["digest"]
    except _DAMAGE:
        is_sound = False
    if not is_sound:
        raise UserError(f"{path} is damaged: delete it and run main.py --mode=evaluate again")
    return found
