"""The effective batch over a run: one number, or stages that begin at given steps, samples, tokens or epochs.

    batch.effective=64
    'batch.effective={0: 64, 1000: 256}'                           64 samples a step, and 256 after 1,000 steps
    'batch.effective={0: 64, 8: 256}' batch.effective_by=epochs    the same after 8 epochs

A stage begins with the first window that starts at or after its place, so each window is of one stage.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gatrain import units
from gatrain.errors import ConfigError

UNITS = ("steps", "samples", "tokens", "epochs")
EXAMPLE = "'batch.effective={0: 64, 1000: 256}'"


@dataclass(frozen=True)
class BatchStages:
    """Rising ``starts``, the first of them 0, and the effective batch from each on."""

    starts: tuple[float, ...]
    sizes: tuple[int, ...]
    by: str = "steps"
    """The unit of ``starts``, one of `UNITS`."""

    @property
    def is_constant(self) -> bool:
        return len(self.sizes) == 1

    @property
    def first(self) -> int:
        return self.sizes[0]

    @property
    def largest(self) -> int:
        """The effective batch that needs most memory and time."""
        return max(self.sizes)

    @property
    def smallest(self) -> int:
        return min(self.sizes)

    def __iter__(self) -> Iterator[tuple[float, int]]:
        return zip(self.starts, self.sizes, strict=True)

    def number_at(self, place: float) -> int:
        """Number of the stage, from 0, that ``place`` lies in."""
        return bisect.bisect_right(self.starts, place) - 1

    def begins(self, number: int) -> str:
        """``after 1,000 steps``: where a later stage begins."""
        start = self.starts[number]
        return f"after {start:,g} {self.by}" if self.by == "epochs" else f"after {start:,.0f} {self.by}"

    @property
    def text(self) -> str:
        """For people: ``64, 256 after 1,000 steps``."""
        later = [f"{size} {self.begins(n)}" for n, size in enumerate(self.sizes) if n]
        return ", ".join([str(self.first), *later])


def read_stages(given: Any, by: str) -> BatchStages:
    """What ``batch.effective`` means.

    Raises:
        ConfigError: it is neither a whole number of at least 1 nor stages.
    """
    if not isinstance(given, Mapping):
        return BatchStages((0,), (_size("batch.effective", given),), by)
    if not given:
        raise ConfigError(f"batch.effective={{}} has no stage. Write a number, or stages such as {EXAMPLE}.")
    found: dict[float, int] = {}
    for key, value in given.items():
        start = _start(key, by)
        if start in found:
            raise ConfigError(f"batch.effective has two stages that begin at {start:g}. Keep one of them.")
        found[start] = _size(f"batch.effective[{key}]", value)
    starts = sorted(found)
    if starts[0] != 0:
        raise ConfigError(
            f"batch.effective={spelt(given)}: the first stage begins at {starts[0]:g}, and nothing says how many "
            f"samples a step has before. Let the first stage begin at 0, as in {EXAMPLE}."
        )
    return BatchStages(tuple(starts), tuple(found[start] for start in starts), by)


def spelt(given: Any) -> str:
    """As it is typed."""
    if not isinstance(given, Mapping):
        return str(given)
    return "{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"


def _start(key: Any, by: str) -> float:
    """The place where a stage begins: YAML and JSON may give it as text."""
    value = key
    if isinstance(key, str):
        try:
            value = float(key) if by == "epochs" and not key.strip().isdigit() else int(key)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise ConfigError(
            f"batch.effective: {key!r} is no place where a stage begins ({by}). Write stages such as {EXAMPLE}."
        )
    if by != "epochs" and not isinstance(value, int):
        raise ConfigError(f"batch.effective: a stage begins at {key!r} {by}, which is not a whole number.")
    return value


def _size(where: str, value: Any) -> int:
    if value == "auto":
        raise ConfigError(
            "batch.effective=auto proposes a batch and sets none: type it on the command line of gatrain fit or "
            "gatrain launch, and give the number that it proposes here."
        )
    if isinstance(value, bool) or not isinstance(value, int):
        text = f"{where}={units.as_typed(value)} is not a whole number of samples. "
        if isinstance(value, float) and value.is_integer() and value >= 1 and where == "batch.effective":
            raise ConfigError(f"{text}Write {where}={int(value)}.")  # 1e3 and 512.0 are floats in YAML
        raise ConfigError(f"{text}Write for example batch.effective=64, or stages by step: {EXAMPLE}.")
    if value < 1:
        raise ConfigError(f"{where}={value} is below 1, the smallest value allowed.")
    if value >= 2**63:
        raise ConfigError(
            f"{where}={value} is not below 2**63, the largest value that files and tensors hold."
        )
    return value
