"""Several data sources as one: each window has its share of every part, the same for any number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from gatrain import batch
from gatrain.data.report import DataReport, Omission
from gatrain.errors import ConfigError
from gatrain.train.order import Ids
from gatrain.train.order.by_number import reads_by_number
from gatrain.train.order.permutation import permutation
from gatrain.train.order.values import check_whole
from gatrain.train.seeding import derive_seed

_SHARED = ("vocab_size", "context", "tokenizer", "classes", "variable_length", "deterministic_collate")
_PART = 0x70617274
_REMEDIES = {
    "tokenizer": "one id would stand for different texts. Write the same tokenizer: in every part (gpt2, or the "
    "path of a tokenizer.json), or read them as one source: path: [A, B]",
    "classes": "one number would stand for different classes. Give every part folders of the same names",
}
"""What says what the numbers of a part mean, and what to write where the parts do not agree."""


class Mixture:
    """Data source: parts, each drawn as often as its weight says.

    An epoch has ``samples`` positions, of which every part has its exact share (in whole samples), shuffled.
    Of each part every sample comes once before any comes again: a part whose share is larger than the part repeats
    within an epoch, one whose share is smaller goes on in the next epoch where it stopped. Held-out samples are
    those of all parts, one after the other.

    Args:
        parts: data sources or datasets, in a list or by name.
        weights: shares of the samples, not below 0, in the order of the parts or by the same names; they need
            not add up to 1. None takes the sizes of the parts.
        samples: of an epoch; None is the sum of the parts' sizes.

    Raises:
        ConfigError: a part cannot be read by number, the weights do not fit the parts, or the same number means
            another token or class in another part.
    """

    def __init__(
        self,
        parts: Sequence[Any] | Mapping[str, Any],
        weights: Sequence[float] | Mapping[str, float] | None = None,
        samples: int | None = None,
    ) -> None:
        named = (
            dict(parts) if isinstance(parts, Mapping) else {str(nth): part for nth, part in enumerate(parts)}
        )
        if not named:
            raise ConfigError("data.parts is empty: a mixture needs at least one part.")
        self._parts = list(named.values())
        _check_meaning(named)
        trains = {name: _by_number(name, getattr(part, "train", part)) for name, part in named.items()}
        shares = _weights(weights, {name: len(train) for name, train in trains.items()})
        self.train = MixedSamples(list(trains.values()), list(trains), shares, samples)
        held_out = [each for part in self._parts if (each := getattr(part, "eval", None)) is not None]
        self.eval: ConcatDataset[Any] | None = ConcatDataset(held_out) if held_out else None
        if self.eval is not None:
            self.eval.deterministic = all(getattr(each, "deterministic", False) for each in held_out)  # type: ignore[attr-defined]
        if collate := getattr(self._parts[0], "collate", None):
            self.collate = collate

    def __getattr__(self, name: str) -> Any:
        """What a task asks a source for, where all parts say the same."""
        if name in _SHARED:
            found = [getattr(part, name, None) for part in self.__dict__["_parts"]]
            if found[0] is not None and all(each == found[0] for each in found):
                return found[0]
        raise AttributeError(name)

    @property
    def report(self) -> DataReport:
        """What each part has in an epoch, and what the parts' own reports left out."""
        reports = [getattr(part, "report", None) for part in self._parts]
        own = [each for each in reports if isinstance(each, DataReport)]
        prints = [each.fingerprint for each in own]
        whole = (
            hashlib.sha256("\n".join(prints).encode()).hexdigest()
            if len(own) == len(reports) and all(prints)
            else ""
        )
        omissions = [
            Omission(f"{each.what} (part {name})", each.count, each.examples, each.of)
            for name, report in zip(self.train.names, reports, strict=True)
            if isinstance(report, DataReport)
            for each in report.omissions
        ]
        return DataReport(
            kind=f"mixture of {self.train.described}",
            classes=_classes(own) if len(own) == len(reports) else None,
            files=sum(each.files for each in own),
            size_bytes=sum(each.size_bytes for each in own),
            items=self.train.samples,
            item_name="samples an epoch",
            omissions=omissions,
            fingerprint=whole,
        )


class MixedSamples(ConcatDataset[Any]):
    """The parts one after the other, by number, with the order in which they are drawn."""

    def __init__(
        self, parts: list[Any], names: list[str], weights: list[float], samples: int | None = None
    ) -> None:
        super().__init__(parts)
        self.names = names
        self._sized = parts
        self.samples = len(self) if samples is None else samples
        if samples is not None:
            check_whole("data.samples", samples, 1000)
        whole = [
            round(weight / max(weights) * 2**40) for weight in weights
        ]  # proportions of whole numbers are exact
        self.shares = batch.proportional_shares(self.samples, whole)
        """Samples of each part in an epoch."""
        for name, share, weight in zip(names, self.shares, weights, strict=True):
            if weight and not share:
                raise ConfigError(
                    f"the weight of part {name} is {weight:g}, which is not one of the {self.samples} samples of "
                    "an epoch. Give it a larger weight, or a larger data.samples."
                )
        self.deterministic = all(getattr(part, "deterministic", False) for part in parts)

    @property
    def described(self) -> str:
        """Each part with its share and how often it is passed through in an epoch."""
        return ", ".join(
            f"{name} {share / self.samples:.1%} ({share / len(part):.3g} passes an epoch)"
            for name, share, part in zip(self.names, self.shares, self._sized, strict=True)
        )

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]

    def window_order(self, seed: int) -> MixedOrder:
        """The order in which a run with this seed draws."""
        return MixedOrder([len(part) for part in self._sized], self.shares, seed)


class MixedOrder:
    """Draw ``p`` of epoch ``e``, by index: a permutation of the epoch says which part and which of its draws, and a
    permutation of each pass over the part which sample.

    Args:
        sizes: samples of each part.
        shares: draws of each part in an epoch.
        seed: the run's.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        self.samples = sum(shares)
        self._sizes = list(sizes)
        self._shares = list(shares)
        self._ends = np.cumsum(shares)
        self._firsts = np.cumsum([0, *sizes[:-1]])
        self._seed = seed

    @property
    def fingerprint(self) -> str:
        """Of the parts' sizes and shares: a run goes on with the same ones."""
        return f"{self._sizes} {self._shares}"

    def ids(self, epoch: int, positions: Ids) -> Ids:
        ids, _ = self._drawn(epoch, positions)
        return ids

    def draws(self, epoch: int, positions: Ids) -> Ids:
        """The pass over its part in which a sample is drawn: it may come several times in an epoch."""
        _, passes = self._drawn(epoch, positions)
        return passes

    def _drawn(self, epoch: int, positions: Ids) -> tuple[Ids, Ids]:
        places = permutation(self.samples, self._seed, epoch, positions)
        parts = np.searchsorted(self._ends, places, side="right")
        ids, passes = np.empty_like(places), np.empty_like(places)
        for part in np.unique(parts).tolist():
            mine = parts == part
            size, share = self._sizes[part], self._shares[part]
            draws = places[mine] - (self._ends[part] - share) + epoch * share  # since the run began
            passes[mine], at = np.divmod(draws, size)
            found = np.empty_like(at)
            for each in np.unique(passes[mine]).tolist():
                now = passes[mine] == each
                found[now] = permutation(size, derive_seed(self._seed, _PART, part), each, at[now])
            ids[mine] = self._firsts[part] + found
        return ids, passes


def _check_meaning(parts: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: parts that number their tokens or classes differently, or make batches differently.
    """
    (first, one), *others = parts.items()
    for name, other in others:
        for what, remedy in _REMEDIES.items():
            known = [value for part in (one, other) if (value := getattr(part, what, None)) is not None]
            if len(known) == 2 and known[0] != known[1]:
                raise ConfigError(
                    f"parts {first} and {name} of the mixture do not have the same {what}: {remedy}."
                )
        if _collate(one) != _collate(other):
            raise ConfigError(
                f"parts {first} and {name} of the mixture make batches in different ways (their collate). Mix "
                "sources of one kind."
            )


def _classes(reports: Sequence[DataReport]) -> dict[str, int] | None:
    """Each class with its samples in all parts; None where a part has none or others."""
    named = [report.classes for report in reports if report.classes is not None]
    if len(named) < len(reports) or any(list(each) != list(named[0]) for each in named):
        return None
    return {name: sum(each[name] for each in named) for name in named[0]}


def _collate(part: Any) -> Any:
    """The function that makes a part's batches, whichever object it belongs to."""
    found = getattr(part, "collate", None)
    return getattr(found, "__func__", found)


def _by_number(name: str, train: Any) -> Any:
    by_number = reads_by_number(train)
    if not by_number or len(train) == 0:
        what = "empty" if by_number else f"a {type(train).__name__}"
        raise ConfigError(
            f"part {name} of the mixture is {what}. A part needs samples by number (__len__ and __getitem__); "
            "streams are mixed by their own library."
        )
    return train


def _weights(given: Any, sizes: Mapping[str, int]) -> list[float]:
    if given is None:
        return [float(size) for size in sizes.values()]
    if isinstance(given, Mapping):
        if given.keys() != sizes.keys():
            raise ConfigError(f"data.weights has {', '.join(given)}, and the parts are {', '.join(sizes)}.")
        given = [given[name] for name in sizes]
    weights = [float(each) for each in given]
    if len(weights) != len(sizes):
        raise ConfigError(f"data.weights has {len(weights)} numbers for {len(sizes)} parts.")
    if not all(math.isfinite(each) and each >= 0 for each in weights) or not any(weights):
        raise ConfigError(f"data.weights={weights} are not numbers of 0 or more, with one above 0.")
    return weights
