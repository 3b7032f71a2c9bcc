"""Recorded memory events as functions of the micro-batch, and their replay through the allocator's model.

Every storage is ``fixed + slope x b`` bytes. Two recordings at different sizes whose events agree give both
numbers exactly, so any micro-batch can be replayed without being traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gatrain.predict.allocator import Block, CachingAllocator

FREED = -1
Events = list[tuple[int, int]]
"""(number of the storage, its bytes, or `FREED`), in the order in which it happened."""

FORWARD_BACKWARD, ACCUMULATING, REDUCE, UPDATE = "first", "further", "reduce", "update"
PHASES = (FORWARD_BACKWARD, ACCUMULATING, REDUCE, UPDATE)


@dataclass
class Work:
    """What the operations of a micro-step compute and move."""

    products: list[tuple[float, float]] = field(default_factory=list)
    """(floating-point operations, bytes) of each matrix product, convolution or attention."""
    other_bytes: float = 0
    other_kernels: int = 0


@dataclass(frozen=True)
class Recording:
    """One traced step at one micro-batch: by phase, what was made and given up."""

    micro_batch: int
    phases: dict[str, Events]
    work: Work
    batch_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "micro_batch": self.micro_batch,
            "phases": self.phases,
            "batch_bytes": self.batch_bytes,
            "work": [self.work.products, self.work.other_bytes, self.work.other_kernels],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recording:
        phases = {name: [(int(n), int(size)) for n, size in rows] for name, rows in data["phases"].items()}
        products, other_bytes, kernels = data["work"]
        work = Work([(flops, moved) for flops, moved in products], other_bytes, kernels)
        return cls(data["micro_batch"], phases, work, data["batch_bytes"])


@dataclass(frozen=True)
class Peak:
    """Largest use of the allocator's memory in a step, in bytes."""

    allocated: int
    reserved: int


class LinearStep:
    """A step whose storages are straight lines in the micro-batch.

    Args:
        low, high: two recordings at different sizes.

    Raises:
        ValueError: their events differ, so the model does different things at the two sizes.
    """

    def __init__(self, low: Recording, high: Recording) -> None:
        self.low, self.high = low, high
        self._phases = {name: _lines(low, high, name) for name in PHASES}
        self._batch = _line(low.micro_batch, low.batch_bytes, high.micro_batch, high.batch_bytes)

    @classmethod
    def proportional(cls, recording: Recording) -> LinearStep:
        """From a single recording at a prime size: what that size divides grows with it, the rest is fixed."""
        size = recording.micro_batch

        def shrunk(count: int) -> int:
            return 0 if count == FREED else (count // size if count % size == 0 else count)

        phases = {
            name: [(number, FREED if count == FREED else shrunk(count)) for number, count in events]
            for name, events in recording.phases.items()
        }
        work = recording.work
        # what a product moves is mostly activations at this size; the weights' share is spread over the samples
        products = [(flops / size, moved / size) for flops, moved in work.products]
        small = Work(products, work.other_bytes / size, work.other_kernels)
        return cls(Recording(1, phases, small, recording.batch_bytes // size), recording)

    def work(self, micro_batch: int) -> Work:
        """Work of one micro-step at a size."""
        low, high = self.low, self.high

        def at(first: float, second: float) -> float:
            slope = (second - first) / (high.micro_batch - low.micro_batch)
            return first + slope * (micro_batch - low.micro_batch)

        products = [
            (at(f1, f2), at(m1, m2))
            for (f1, m1), (f2, m2) in zip(low.work.products, high.work.products, strict=True)
        ]
        return Work(products, at(low.work.other_bytes, high.work.other_bytes), low.work.other_kernels)

    def peak(
        self,
        micro_batch: int,
        persistent: Iterable[int],
        *,
        accumulates: bool,
        expandable: bool = False,
    ) -> Peak:
        """Replay two steps at a size.

        Args:
            persistent: bytes of each storage that outlives steps: parameters, optimizer state, workspaces.
            accumulates: several micro-steps in a step, so that gradients live while activations do.
            expandable: the allocator's ``expandable_segments``.
        """
        allocator = CachingAllocator(expandable)
        for size in persistent:
            allocator.allocate(size)
        names = PHASES if accumulates else tuple(name for name in PHASES if name != ACCUMULATING)
        dropped = set() if accumulates else self._temporary_of(ACCUMULATING)
        surviving = [] if accumulates else self._made_in(ACCUMULATING, dropped)
        for _ in range(2):  # the second step finds the fragments that the first left
            live: dict[int, Block | None] = {}
            for name in names:
                self._replay(name, micro_batch, allocator, live, dropped)
                if name == FORWARD_BACKWARD:
                    for number, fixed, slope in surviving:
                        live[number] = allocator.allocate(_bytes(fixed, slope, micro_batch))
            for block in live.values():  # the last small scalars live until the next step replaces them
                allocator.free(block)
        copies = CachingAllocator(expandable)  # batches arrive on a stream of their own, one ahead of its use
        for _ in range(2 if accumulates else 1):
            copies.allocate(_bytes(*self._batch, micro_batch))
        return Peak(
            allocator.peak_allocated + copies.peak_allocated, allocator.peak_reserved + copies.peak_reserved
        )

    def _replay(
        self,
        name: str,
        micro_batch: int,
        allocator: CachingAllocator,
        live: dict[int, Block | None],
        dropped: set[int],
    ) -> None:
        for number, fixed, slope in self._phases[name]:
            if number in dropped:
                continue
            if fixed == FREED:
                if number in live:
                    allocator.free(live.pop(number))
            elif number not in live:
                live[number] = allocator.allocate(_bytes(fixed, slope, micro_batch))

    def _temporary_of(self, phase: str) -> set[int]:
        made = {number for number, fixed, _ in self._phases[phase] if fixed != FREED}
        return made & {number for number, fixed, _ in self._phases[phase] if fixed == FREED}

    def _made_in(self, phase: str, dropped: set[int]) -> list[tuple[int, float, float]]:
        return [line for line in self._phases[phase] if line[1] != FREED and line[0] not in dropped]


def same_events(first: Recording, second: Recording, phases: Iterable[str] = PHASES) -> bool:
    """Whether two recordings do the same things in the same order, whatever their sizes."""
    return all(
        [(n, size == FREED) for n, size in first.phases[name]]
        == [(n, size == FREED) for n, size in second.phases[name]]
        for name in phases
    ) and len(first.work.products) == len(second.work.products)


def _lines(low: Recording, high: Recording, phase: str) -> list[tuple[int, float, float]]:
    first, second = low.phases[phase], high.phases[phase]
    if not same_events(low, high):
        raise ValueError(f"micro-batches {low.micro_batch} and {high.micro_batch} do different things")
    return [
        (number, FREED, 0.0)
        if size == FREED
        else (number, *_line(low.micro_batch, size, high.micro_batch, larger))
        for (number, size), (_, larger) in zip(first, second, strict=True)
    ]


def _line(low: int, low_bytes: float, high: int, high_bytes: float) -> tuple[float, float]:
    slope = (high_bytes - low_bytes) / (high - low)
    return low_bytes - slope * low, slope


def _bytes(fixed: float, slope: float, micro_batch: int) -> int:
    return max(0, round(fixed + slope * micro_batch))
