"""One way between dataclasses and JSON, by type hints: strict in keys and types when it reads.

`encode` gives what `json.dumps` takes, `decode` the dataclass again. A dataclass whose
values have ranges, or depend on each other, has a method ``check()`` that raises ValueError: `decode` calls it, the
innermost first.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar

from gatrain.schema import LARGEST, shown

T = TypeVar("T")
INLINE = {"inline": True}
"""Metadata of a field that holds a dataclass whose own fields stand in the JSON beside the others, below no key."""

_DICTS = (dict, collections.abc.Mapping)
_LISTS = (list, collections.abc.Sequence)
_TUPLES = (tuple, collections.abc.Iterable)
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def encode(value: Any) -> Any:
    """``value`` as objects, lists, texts and numbers: what `json.dumps` takes.

    Dataclasses become objects with all their fields, tuples and sets lists. Anything else stays as it is.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for each in dataclasses.fields(value):
            coded = encode(getattr(value, each.name))
            found |= coded if each.metadata == INLINE else {each.name: coded}
        return found
    if isinstance(value, Mapping):
        return {name: encode(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(each) for each in value]
    return value


def decode(kind: type[T], data: Any, *, unknown_keys: bool = True, finite: bool = True) -> T:
    """Build ``kind`` from what `json.loads` gave; its annotations are the schema.

    Known are dataclasses, int, float, str, bool, None, Any, Literal, unions, lists, tuples (also what is annotated
    Sequence or Iterable) and dicts with text as keys (also Mapping). A bool is no number and a float no int; ints
    are at most 2**63 in size.

    Args:
        unknown_keys: whether a dataclass's keys of a newer version are passed over.
        finite: refuse infinity and NaN.

    Raises:
        ValueError: the first place that is not right, with what was found there.
    """
    found: T = _Decoder(unknown_keys, finite).value(kind, data, "")
    return found


@dataclasses.dataclass(frozen=True)
class _Decoder:
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
        if origin is Literal:
            return self.literal(arguments, data, place)
        if origin in (*_LISTS, *_TUPLES) and (
            type(data) is list or (origin in _TUPLES and type(data) is tuple)  # JSON has lists alone
        ):
            items = arguments if origin is tuple else (arguments[0], ...)
            return self.sequence(list if origin in _LISTS else tuple, items, data, place)
        if origin in _DICTS and type(data) is dict:
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

    def literal(self, allowed: tuple[Any, ...], data: Any, place: str) -> Any:
        if any(type(data) is type(each) and data == each for each in allowed):
            return data
        raise ValueError(f"{_named(place)} is {shown(data)}, not one of {', '.join(map(str, allowed))}")

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

    def dataclass(self, kind: type[Any], data: Any, place: str, is_inline: bool = False) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{_named(place)} is {shown(data)}, not an object")
        hints = _hints(typing.cast("Hashable", kind))
        values = {}
        for each in dataclasses.fields(kind):
            below = f"{place}.{each.name}" if place else each.name
            if each.metadata == INLINE:
                values[each.name] = self.dataclass(hints[each.name], data, place, is_inline=True)
            elif each.name in data:
                values[each.name] = self.value(hints[each.name], data[each.name], below)
            elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise ValueError(f"{below} is missing")
        extra = set(data) - _keys(kind)
        if extra and not self.unknown_keys and not is_inline:
            raise ValueError(f"{_named(place)} has the unknown key {shown(min(extra))}")
        try:
            found = kind(**values)
            if callable(getattr(kind, "check", None)):
                found.check()
        except ValueError as error:
            raise ValueError(f"{place}: {error}" if place else str(error)) from error
        return found

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


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _keys(kind: Any) -> set[str]:
    """The keys that a dataclass has in JSON."""
    found: set[str] = set()
    for each in dataclasses.fields(kind):
        below = _hints(kind)[each.name] if each.metadata == INLINE else None
        found |= _keys(below) if below is not None else {each.name}
    return found


def _named(place: str) -> str:
    return place or "the whole"


def _words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (*_LISTS, *_TUPLES):
        return "a list"
    return "an object" if origin in _DICTS else _NAMES.get(kind, "null")
