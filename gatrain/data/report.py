"""What a data source has read, and what it has not: counted, named, and compared when a run goes on.

A source offers it as ``report``: an attribute, or better a property (only one process of a run asks for it, and a
fingerprint of large data takes a while). A source may also have ``check(progress)``, which reads every file or
sample once and returns the `Omission`s that it finds, broken ones with their names;
``progress(done, total)`` is called now and then. `gatrain show --data --check` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 5
"""First names that are kept of each kind of thing that was left out."""


@dataclass(frozen=True)
class Omission:
    """One kind of thing that was left out, cut, replaced, skipped or found unreadable.

    Attributes:
        what: plain words that follow a number, such as ``"hidden files left out"``.
        count: how many.
        examples: the first names, at most `EXAMPLES`.
        of: out of how many there could have been, if that is known: it gives the share.
    """

    what: str
    count: int
    examples: tuple[str, ...] = ()
    of: int | None = None


class Omissions:
    """Counts kinds of things while a source is read, in the order in which they were met first."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._of: dict[str, int] = {}

    def add(self, what: str, example: str | None = None, count: int = 1, of: int | None = None) -> None:
        """Count ``count`` more of ``what``; ``of`` says out of how many in all."""
        self._counts[what] = self._counts.get(what, 0) + count
        names = self._examples.setdefault(what, [])
        if example is not None and len(names) < EXAMPLES:
            names.append(example)
        if of is not None:
            self._of[what] = of

    def found(self) -> list[Omission]:
        """Everything that was counted."""
        return [
            Omission(what, count, tuple(self._examples[what]), self._of.get(what))
            for what, count in self._counts.items()
        ]


@dataclass(frozen=True)
class DataReport:
    """What was read. A source offers it as the attribute ``report``; a user's own source may, too.

    Attributes:
        kind: what the source is, such as ``"text files"``, ``"JSON Lines"``, ``"images in class folders"``.
        files, size_bytes: files that were read, and their size on disk.
        items, item_name: what they hold, such as 1,200 ``"documents"``, ``"images"`` or ``"tokens"``.
        encoding: of text; None where there is none.
        classes: images or samples of each class, by its name, in the order of the class numbers.
        omissions: what was left out, cut, replaced or unreadable.
        fingerprint: hash of the contents; "" where it is not known.
    """

    kind: str
    files: int = 0
    size_bytes: int = 0
    items: int = 0
    item_name: str = "samples"
    encoding: str | None = None
    classes: Mapping[str, int] | None = None
    omissions: Iterable[Omission] = field(default_factory=tuple)
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "omissions": [asdict(omission) for omission in self.omissions]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataReport:
        """The inverse of `to_dict`."""
        omissions = tuple(
            Omission(**{**entry, "examples": tuple(entry["examples"])}) for entry in data["omissions"]
        )
        return cls(**{**data, "omissions": omissions})
