"""One way between dataclasses and JSON: what comes back is what went in, and nothing else is believed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from gatrain import codec, schema


@dataclass(frozen=True)
class Part:
    size: int
    kind: Literal["small", "large"] = "small"

    def check(self) -> None:
        schema.at_least(1, size=self.size)


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    pair: tuple[float, float] | None = None
    by_name: dict[str, list[int]] = field(default_factory=dict)
    micro: int | Literal["auto"] = "auto"
    read: Mapping[str, Part] = field(default_factory=dict)
    seen: Sequence[int] = field(default_factory=list)
    left: Iterable[str] = ()
    anything: Any = None


@dataclass(frozen=True)
class Flat:
    part: Part = field(metadata=codec.INLINE)
    name: str = "f"


WHOLE = Whole(
    "a",
    (Part(1), Part(2, "large")),
    (0.5, 2),
    {"x": [1, 2]},
    8,
    {"p": Part(3)},
    [4],
    ("b",),
    {"deep": [None]},
)


def test_what_was_encoded_is_decoded_to_the_same() -> None:
    assert codec.decode(Whole, json.loads(json.dumps(codec.encode(WHOLE)))) == WHOLE
    assert codec.decode(Whole, {"name": "b"}) == Whole("b")
    assert codec.decode(list[Part], [{"size": 1}]) == [Part(1)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name is missing"),
        ({"name": "a", "parts": [{"size": 1}, {"size": 0}]}, r"parts\[1\]: size is 0, not 1 or more"),
        ({"name": "a", "parts": [{"size": True}]}, r"parts\[0\].size is True, not a whole number"),
        ({"name": "a", "read": {"p": {"size": 1, "kind": "odd"}}}, "kind is 'odd', not one of small, large"),
        ({"name": "a", "micro": "some"}, "micro is 'some', not one of auto"),
        ({"name": "a", "pair": [1]}, "pair has 1 items, not 2"),
        ({"name": "a", "by_name": []}, "by_name is a list of 0, not an object"),
        ([], "the whole is a list of 0, not an object"),
    ],
    ids=str,
)
def test_the_first_wrong_place_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.decode(Whole, data)


def test_an_inline_dataclass_has_its_fields_beside_the_others() -> None:
    flat = Flat(Part(2, "large"))
    assert codec.encode(flat) == {"size": 2, "kind": "large", "name": "f"}
    assert codec.decode(Flat, codec.encode(flat), unknown_keys=False) == flat
    with pytest.raises(ValueError, match="size is 0"):
        codec.decode(Flat, {"size": 0})
    with pytest.raises(ValueError, match="unknown key 'odd'"):
        codec.decode(Flat, {"size": 1, "odd": 0}, unknown_keys=False)


def test_keys_of_a_newer_version_are_passed_over_unless_they_are_refused() -> None:
    data = {"name": "a", "of_a_newer_version": 1}
    assert codec.decode(Whole, data) == Whole("a")
    with pytest.raises(ValueError, match="unknown key 'of_a_newer_version'"):
        codec.decode(Whole, data, unknown_keys=False)
