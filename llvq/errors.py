"""What a user did that cannot work: main.py prints these as one line."""

import re


class UserError(Exception):
    """A mistake of the user's, with a message of one line: what is wrong and what to do."""


class DivergenceError(UserError):
    """The loss or the gradient became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for a message of one line."""
    lines = str(error).strip().splitlines()
    # TensorStore appends where in its source this is, and the whole specification of an array.
    line = re.split(r" \[\w+=", lines[0])[0] if lines else type(error).__name__
    # What went wrong comes last, after the nested names of what was being done.
    return line if len(line) <= 200 else f"{line[:80]} … {line[-100:]}"
