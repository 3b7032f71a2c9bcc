"""What a data source has read, and what it has not: counted, named, and compared when a run goes on.

A source offers it as ``report``: an attribute, or better a property (only one process of a run asks for it, and a
fingerprint of large data takes a while). A source may also have ``check()``, which reads every file or sample once
and returns a `DataReport` (or the `Omission`s) with what it found broken, each with its name; where it takes
``progress``, that is called now and then with what is done and the total. `gatrain show --data --check` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 5
"""First names that are kept of each kind of thing that was left out."""
WARNED_SHARE = 0.05
"""A larger share that was cut, left out or unreadable is a warning."""


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

    @property
    def is_large(self) -> bool:
        """Whether its share deserves a warning."""
        return bool(self.of) and self.count > WARNED_SHARE * (self.of or 0)


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

    def told(self) -> str:
        """In brackets, for the end of a sentence in an error; empty where there is nothing."""
        found = [f"{count} {what}" for what, count in self._counts.items()]
        return f" ({'; '.join(found)})" if found else ""


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


@dataclass(frozen=True)
class DataRecord:
    """What a look at a run's data found: printed, kept in the run folder, and compared when the run goes on.

    Attributes:
        report: what the source says of itself; of a source that says nothing, what can be seen from outside.
        train_samples, eval_samples: samples to train on and held out.
        shapes: what a sample is, such as ``"float32 [3, 224, 224], int"``.
        samples: a few samples, by their number: see `gatrain.train.sample_prints`.
        not_compared: why contents that changed might go unseen; "" where they would not.
        is_stream: the training data does not tell how many samples it has; ``train_samples`` is 0.
    """

    report: DataReport
    train_samples: int
    eval_samples: int
    shapes: str = ""
    samples: Mapping[str, Any] = field(default_factory=dict)
    not_compared: str = ""
    is_stream: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "report": self.report.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataRecord:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        record = cls(**{**data, "report": DataReport.from_dict(data["report"])})
        report = record.report
        counts = [record.train_samples, record.eval_samples, report.files, report.size_bytes, report.items]
        counts += [*(report.classes or {}).values(), *(omission.count for omission in report.omissions)]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("not a count")
        texts = [record.shapes, record.not_compared, report.kind, report.item_name, report.fingerprint]
        texts += [text for each in report.omissions for text in (each.what, *each.examples)]
        if not all(isinstance(text, str) for text in texts) or not isinstance(record.samples, dict):
            raise TypeError("not a text")
        return record

    def omissions(self) -> list[Omission]:
        """What was left out, cut, replaced or unreadable."""
        return [omission for omission in self.report.omissions if omission.count]

    def warnings(self) -> list[str]:
        """A sentence for each kind of omission that takes a large share."""
        return [
            f"{omission.count:,} of {omission.of:,} ({omission.count / omission.of:.0%}): {omission.what}"
            for omission in self.omissions()
            if omission.of and omission.is_large
        ]
