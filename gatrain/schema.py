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

MOST_COUNT = 2**53
"""Counts are below this: they are summed as float64."""
LONGEST = 60
"""Characters of a wrong value that a message shows."""


def parse(kind: type[T], data: Any, *, unknown_keys: bool = True) -> T:
    """Build ``kind`` from what `json.loads` gave; its annotations are the schema.

    Known are dataclasses, int, float, str, bool, None, Any, unions, lists, tuples and dicts with text as keys. A
    bool is no number and a float no int; numbers are finite; ints are below 2**53 in size.

    Args:
        unknown_keys: whether a dataclass's keys of a newer version are passed over.

    Raises:
        ValueError: the first place that is not right, with what was found there.
    """
    found: T = _value(kind, data, "", unknown_keys)
    return found


def at_least(lowest: float, **values: float | None) -> None:
    """Check a range; None counts as not given.

    Raises:
        ValueError: names the first value below ``lowest``.
    """
    for name, value in values.items():
        if value is not None and not value >= lowest:
            raise ValueError(f"{name} is {shown(value)}, below {lowest:g}")


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
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST_COUNT:
        return "a number of 2**53 or more" if value > 0 else "a number of -2**53 or less"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _value(kind: Any, data: Any, place: str, unknown_keys: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, data, place, unknown_keys)
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast("type[Any]", kind), data, place, unknown_keys)
    if origin in (list, tuple) and type(data) is list:
        return _sequence(origin, arguments, data, place, unknown_keys)
    if origin is dict and type(data) is dict:
        return {
            name: _value(arguments[1], each, f"{place}[{shown(name)}]", unknown_keys)
            for name, each in data.items()
        }
    if kind is float and type(data) in (int, float):
        return _finite(data, place)
    if kind is int and type(data) is int:
        return _finite(data, place)
    if kind is type(None) and data is None:
        return None
    if kind in (str, bool) and type(data) is kind:
        return data
    raise ValueError(f"{_named(place)} is {shown(data)}, not {_words(kind)}")


def _finite(number: float, place: str) -> float:
    if isinstance(number, int):
        if abs(number) > MOST_COUNT:
            raise ValueError(f"{_named(place)} is {shown(number)}")
    elif not math.isfinite(number):
        raise ValueError(f"{_named(place)} is {number}, not a finite number")
    return number


def _union(kinds: tuple[Any, ...], data: Any, place: str, unknown_keys: bool) -> Any:
    if data is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _value(kind, data, place, unknown_keys)
        except ValueError:
            continue
    return _value(others[-1], data, place, unknown_keys)


def _dataclass(kind: type[Any], data: Any, place: str, unknown_keys: bool) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{_named(place)} is {shown(data)}, not an object")
    hints = typing.get_type_hints(kind)
    values = {}
    for each in dataclasses.fields(kind):
        below = f"{place}.{each.name}" if place else each.name
        if each.name in data:
            values[each.name] = _value(hints[each.name], data[each.name], below, unknown_keys)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise ValueError(f"{below} is missing")
    extra = [name for name in data if name not in hints]
    if extra and not unknown_keys:
        raise ValueError(f"{_named(place)} has the unknown key {shown(extra[0])}")
    return kind(**values)


def _sequence(
    origin: Any, arguments: tuple[Any, ...], data: list[Any], place: str, unknown_keys: bool
) -> Any:
    if origin is tuple and Ellipsis not in arguments:
        if len(data) != len(arguments):
            raise ValueError(f"{_named(place)} has {len(data)} items, not {len(arguments)}")
        kinds = arguments
    else:
        kinds = (arguments[0],) * len(data)
    return origin(
        _value(kind, each, f"{place}[{index}]", unknown_keys)
        for index, (kind, each) in enumerate(zip(kinds, data, strict=True))
    )


def _named(place: str) -> str:
    return place or "the whole"


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(
        kind, {list: "a list", tuple: "a list", dict: "an object"}.get(typing.get_origin(kind), "null")
    )
