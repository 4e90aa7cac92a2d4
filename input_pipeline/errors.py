"""Errors about data that a user can mend: main.py prints these as one line."""


class DataError(Exception):
    """Data is missing or wrong; the message names it in one line and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # libraries' own may have several
