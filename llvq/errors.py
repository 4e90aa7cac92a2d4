"""Users' mistakes. Every command prints one of these as one line, without a traceback."""

import contextlib
import re
import sys
from collections.abc import Iterator

import jax


class UserError(Exception):
    """A mistake of the user's, with a message of one line: what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # libraries' own may have several


class DamageError(Exception):
    """Damage to a checkpoint or a stream; the message says how it shows."""


class DivergenceError(UserError):
    """The loss or the gradient became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """The message of a library's exception, short enough for one line."""
    lines = str(error).strip().splitlines()
    # TensorStore appends where in its source this is, and the whole specification of an array.
    line = re.split(r" \[\w+=", lines[0])[0] if lines else type(error).__name__
    # The cause comes last, after the nested names of what was being done.
    return line if len(line) <= 200 else f"{line[:80]} … {line[-100:]}"


@contextlib.contextmanager
def one_line_exit(program: str) -> Iterator[None]:
    """Ends the program with the message of a UserError, on one line, and exit code 1."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")


@contextlib.contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Makes a UserError of what JAX and NumPy raise when the machine or a device has too little."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = first_line(error)
        is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason
        # On the CPU it may be an INTERNAL error.
        if not is_memory and "out of memory" not in reason.lower():
            raise
        raise UserError(
            f"not enough memory ({reason:.150}): lower --config.batch_size or the sizes in "
            "--config.model and --config.quantizer"
        ) from error
