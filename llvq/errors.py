"""What a user did that cannot work: main.py prints these as one line."""


class UserError(Exception):
    """A mistake of the user's, with a message of one line: what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # libraries' own may have several


class DivergenceError(UserError):
    """The loss or the gradient became NaN or infinite."""


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
