"""The ranges of a config's fields and of a quantizer's options.

A field carries its range in its annotation, beside its default; bool and Literal are ranges, too:

    codebook_size: Annotated[int, Integer(2, 2**24)] = 512
    distance: Literal["euclidean", "cosine"] = "euclidean"
"""

import dataclasses
import difflib
import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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
class Text:
    """Every text that may be part of a file's name."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and "\0" not in value

    def __str__(self) -> str:
        return "a text"


@dataclasses.dataclass(frozen=True)
class _Flag:
    """True and False: the range of what is annotated as bool."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A few texts: the range of what is annotated as a Literal."""

    values: tuple[str, ...]

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
    hints = typing.get_type_hints(owner, include_extras=True).items()
    found = {name: _range(hint) for name, hint in hints if name != "return"}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def _range(hint: Any) -> Range | None:
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__metadata__[0]
    if typing.get_origin(hint) is typing.Literal:
        return _Choice(typing.get_args(hint))
    return _Flag() if hint is bool else None


def options(constructor: Callable[..., Any]) -> dict[str, tuple[Any, Range]]:
    """(default, range) of every parameter of a constructor that is annotated with a range."""
    if isinstance(constructor, type):
        constructor = constructor.__init__  # type: ignore[misc]
    parameters = inspect.signature(constructor).parameters
    return {
        name: (parameters[name].default, range_) for name, range_ in ranges(constructor).items()
    }


def entry(registry: Mapping[str, Any], name: str, what: str) -> Any:
    """Looks a name up in a registry.

    Raises:
      UserError: if it is not there; the message has the nearest name and all names.
    """
    if name in registry:
        return registry[name]
    raise UserError(f"unknown {what} {name!r}{nearest(name, registry)}: {_choices(registry)}")


def complete(
    constructor: Callable[..., Any], given: Mapping[str, Any], prefix: str, what: str
) -> dict[str, Any]:
    """Returns all options of a constructor: those given, and its defaults for the others.

    Args:
      constructor: has a parameter with a range for each option.
      given: some of the options.
      prefix: of the options' names in a config, for messages.
      what: is constructed, for messages.

    Raises:
      UserError: if an option is unknown or beyond its range.
    """
    known = options(constructor)
    for name in given:
        if name not in known:
            raise UserError(
                f"config.{prefix}{name} is not an option of {what}"
                f"{nearest(name, known)}: {what} takes {', '.join(known) or 'none'}"
            )
    completed = {name: default for name, (default, _) in known.items()} | dict(given)
    check(completed, {name: range_ for name, (_, range_) in known.items()}, prefix)
    return completed


def section(
    kind: Any, name: str, values: Mapping[str, Any], registry: Mapping[str, Any] | None = None
) -> Any:
    """Makes a section of a config, a dataclass, from nested dicts.

    Args:
      kind: the dataclass.
      name: of the section.
      values: the config, in which the section may be missing.
      registry: what the section's `name` is of. The fields that the dataclass lacks are then the
        options of that entry; the dataclass gets them all as `options`.

    Raises:
      UserError: if there is no such field, name or option, or a value is beyond its range.
    """
    given = values.get(name, {})
    require(isinstance(given, Mapping), name, given, "a dict of fields")
    given = dict(given)
    if registry is not None:
        chosen = given.setdefault("name", kind.name)
        require(isinstance(chosen, str), f"{name}.name", chosen, "a text")
        constructor = entry(registry, chosen, f"config.{name}.name")
        constructor = getattr(constructor, "constructor", constructor)
        own = {field.name for field in dataclasses.fields(kind)}
        options = {key: given.pop(key) for key in [*given] if key not in own}
        given["options"] = complete(constructor, options, f"{name}.", chosen)
    return fill(kind, given, f"{name}.")


def fill(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Makes a dataclass of some values; raises UserError for unknown fields and wrong values."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise UserError(f"config.{prefix}{name} is not a field{nearest(name, known)}")
    filled = kind(**values)
    check(vars(filled), ranges(kind), prefix)
    return filled


def nearest(name: str, known: Iterable[str]) -> str:
    """Names the most similar of some names, in brackets; empty if none is similar."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


def _choices(known: Iterable[str]) -> str:
    return f"choose one of {', '.join(known)}"


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
