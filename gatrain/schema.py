"""From JSON to typed dataclasses, believing nothing: a value of another type is an error that names its place.

Every file that gatrain reads back may be damaged, of another version, or written by somebody else.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST = 2**63
"""Whole numbers are below this."""
LONGEST = 60
"""Characters of a wrong value that a message shows."""


def parse(kind: type[T], data: Any, *, unknown_keys: bool = True, finite: bool = True) -> T:
    """Build ``kind`` from what `json.loads` gave; its annotations are the schema.

    Known are dataclasses, int, float, str, bool, None, Any, unions, lists, tuples and dicts with text as keys. A
    bool is no number and a float no int; ints are at most 2**63 in size.

    Args:
        unknown_keys: whether a dataclass's keys of a newer version are passed over.
        finite: refuse infinity and NaN.

    Raises:
        ValueError: the first place that is not right, with what was found there.
    """
    found: T = _Parser(unknown_keys, finite).value(kind, data, "")
    return found


def at_least(lowest: float, **values: float | None) -> None:
    """Check that values are finite and ``lowest`` or more; None counts as not given.

    Raises:
        ValueError: names the first value that is not.
    """
    for name, value in values.items():
        if value is not None and not lowest <= value < math.inf:
            raise ValueError(f"{name} is {shown(value)}, not {lowest:g} or more")


def one_of(allowed: typing.Collection[str], **values: str) -> None:
    """Check that each value is one of ``allowed``.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} is {shown(value)}, not one of {', '.join(allowed)}")


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and without control characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "a number above 2**63" if value > 0 else "a number below -2**63"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@dataclasses.dataclass(frozen=True)
class _Parser:
    unknown_keys: bool
    finite: bool

    def value(self, kind: Any, data: Any, place: str) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return data
        if origin in (typing.Union, types.UnionType):
            return self.union(arguments, data, place)
        if dataclasses.is_dataclass(kind):
            return self.dataclass(typing.cast("type[Any]", kind), data, place)
        if origin in (list, tuple) and type(data) in (list, origin):  # JSON has lists alone
            return self.sequence(origin, arguments, data, place)
        if origin is dict and type(data) is dict:
            return {
                name: self.value(arguments[1], each, f"{place}[{shown(name)}]") for name, each in data.items()
            }
        if (kind is float and type(data) in (int, float)) or (kind is int and type(data) is int):
            return self.number(data, place)
        if (kind is type(None) and data is None) or (kind in (str, bool) and type(data) is kind):
            return data
        raise ValueError(f"{_named(place)} is {shown(data)}, not {_words(kind)}")

    def number(self, number: float, place: str) -> float:
        if isinstance(number, int):
            if abs(number) > LARGEST:
                raise ValueError(f"{_named(place)} is {shown(number)}")
        elif self.finite and not math.isfinite(number):
            raise ValueError(f"{_named(place)} is {number}, not a finite number")
        return number

    def union(self, kinds: tuple[Any, ...], data: Any, place: str) -> Any:
        if data is None and type(None) in kinds:
            return None
        others = [kind for kind in kinds if kind is not type(None)]
        for kind in others[:-1]:
            try:
                return self.value(kind, data, place)
            except ValueError:
                continue
        return self.value(others[-1], data, place)

    def dataclass(self, kind: type[Any], data: Any, place: str) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{_named(place)} is {shown(data)}, not an object")
        hints = typing.get_type_hints(kind)
        values = {}
        for each in dataclasses.fields(kind):
            below = f"{place}.{each.name}" if place else each.name
            if each.name in data:
                values[each.name] = self.value(hints[each.name], data[each.name], below)
            elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise ValueError(f"{below} is missing")
        extra = [name for name in data if name not in hints]
        if extra and not self.unknown_keys:
            raise ValueError(f"{_named(place)} has the unknown key {shown(extra[0])}")
        return kind(**values)

    def sequence(self, origin: Any, arguments: tuple[Any, ...], data: Any, place: str) -> Any:
        if origin is tuple and Ellipsis not in arguments:
            if len(data) != len(arguments):
                raise ValueError(f"{_named(place)} has {len(data)} items, not {len(arguments)}")
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(data)
        return origin(
            self.value(kind, each, f"{place}[{index}]")
            for index, (kind, each) in enumerate(zip(kinds, data, strict=True))
        )


def _named(place: str) -> str:
    return place or "the whole"


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(
        kind, {list: "a list", tuple: "a list", dict: "an object"}.get(typing.get_origin(kind), "null")
    )
