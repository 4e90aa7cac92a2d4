"""The ranges of a config's fields and of a quantizer's options.

A field carries its range in its annotation, beside its default:

    codebook_size: Annotated[int, Integer(2, 2**24)] = 512
"""

import dataclasses
import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llvq.errors import UserError

# No field needs a larger number. Steps stay within int32, and sizes that no machine has the memory
# for fail there, and say so, before any arithmetic overflows.
LARGEST = 2**31 - 1


class Range(Protocol):
    """The values that a field may take; `str` says in words which they are."""

    def accepts(self, value: Any) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Integer:
    """The integers from `smallest` to `largest`."""

    smallest: int
    largest: int = LARGEST

    def accepts(self, value: Any) -> bool:
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return is_integer and self.smallest <= value <= self.largest

    def __str__(self) -> str:
        return f"an integer from {self.smallest} to {self.largest}"


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
    """The powers of two from `smallest` to `largest`."""

    smallest: int
    largest: int

    def accepts(self, value: Any) -> bool:
        return Integer(self.smallest, self.largest).accepts(value) and value & (value - 1) == 0

    def __str__(self) -> str:
        return f"a power of two from {self.smallest} to {self.largest}"


@dataclasses.dataclass(frozen=True)
class Number:
    """The numbers from `smallest` to `largest`, perhaps without one of these two."""

    smallest: float = -LARGEST
    largest: float = LARGEST
    excluded: float | None = None

    def accepts(self, value: Any) -> bool:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return is_number and self.smallest <= value <= self.largest and value != self.excluded

    def __str__(self) -> str:
        but = "" if self.excluded is None else f", but not {self.excluded:g}"
        return f"a number from {self.smallest} to {self.largest}{but}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """True and False."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Text:
    """Every text that may be part of a file's name."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and "\0" not in value

    def __str__(self) -> str:
        return "a text"


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """A few values that are named."""

    values: tuple[str, ...]

    def __init__(self, *values: str) -> None:
        object.__setattr__(self, "values", values)

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"


@dataclasses.dataclass(frozen=True)
class Several:
    """Sequences of values of one range: of `length` values, or of one or more."""

    item: Range
    length: int | None = None

    def accepts(self, value: Any) -> bool:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_sequence or len(value) != (self.length or max(len(value), 1)):
            return False
        return all(map(self.item.accepts, value))

    def __str__(self) -> str:
        return f"{self.length or 'one or more'} values, each {self.item}"


def ranges(owner: Any) -> dict[str, Range]:
    """The range of every annotated field of a dataclass, or parameter of a function."""
    return {
        name: hint.__metadata__[0]
        for name, hint in typing.get_type_hints(owner, include_extras=True).items()
        if typing.get_origin(hint) is typing.Annotated
    }


def options(constructor: Callable[..., Any]) -> dict[str, tuple[Any, Range]]:
    """(default, range) of every parameter of a constructor that is annotated with a range."""
    parameters = inspect.signature(constructor).parameters
    return {
        name: (parameters[name].default, range_) for name, range_ in ranges(constructor).items()
    }


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but with a ValueError for an argument outside the range of its annotation."""

    @functools.wraps(function)
    def check_and_call(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for name, range_ in ranges(function).items():
            if name in given and not range_.accepts(given[name]):
                raise ValueError(f"{name}={given[name]!r}: must be {range_}")
        return function(*args, **kwargs)

    return check_and_call


def check(values: Mapping[str, Any], allowed: Mapping[str, Range], prefix: str = "") -> None:
    """Raises UserError, naming the field, unless every value is within its range."""
    for name, range_ in allowed.items():
        require(range_.accepts(values[name]), f"{prefix}{name}", values[name], str(range_))


def require(condition: bool, field: str, value: Any, expected: str) -> None:
    """Raises UserError with a field's name, its value and what it must be, unless it is so."""
    if not condition:
        found = repr(value)
        found = found if len(found) <= 100 else f"{found[:100]}…"
        raise UserError(f"config.{field}={found}: must be {expected}")


def plain(value: Any) -> Any:
    """A config with dicts for all mappings and tuples for all lists, so that equal ones compare so.

    NumPy's numbers become Python's. Takes an ml_collections.ConfigDict, which is no Mapping, only
    like one.
    """
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names, e.g. {"model.latent_dim": 64}."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
