"""Recorded memory events as functions of the micro-batch, and their replay through the allocator's model.

Every storage is ``fixed + slope x b`` bytes. Two recordings at different sizes whose events agree give both
numbers exactly, so any micro-batch can be replayed without being traced. A single recording is exact at its own
size; at others it is read as if what its size divides grew with the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gatrain.predict.allocator import Block, CachingAllocator

FREED, WORKSPACE, GRADIENT = -1, -2, -3
"""Marks in the place of bytes: the storage is given up; cuBLAS is used for the first time by a thread (that of the
forward is number 0, that of the backward 1) and takes its workspace for good; the storage is what a parameter's
``.grad`` gets from this micro-step."""
Events = list[tuple[int, int]]
"""(number of the storage, its bytes or a mark), in the order in which it happened."""

MICRO_STEP, REDUCE, UPDATE = "micro_step", "reduce", "update"
STEPS = 2
"""Steps that are replayed. The second finds the fragments that the first left; further ones change nothing (tried
for GPT-2 and ResNet-50)."""
CURVED_BYTES, CURVED_SHARE = 2**16, 0.02

Line = tuple[int, int, float, float]
"""(number, mark or 0, bytes at size 0, bytes a sample)."""


@dataclass
class Work:
    """What the operations of a micro-step compute and move."""

    products: list[tuple[float, float]] = field(default_factory=list)
    """(floating-point operations, bytes) of each matrix product, convolution or attention."""
    other_bytes: float = 0
    other_kernels: int = 0
    constants: list[float] = field(default_factory=list)
    """Of each product's bytes, those that do not grow with the batch: weights and their gradients."""
    other_constant: float = 0


@dataclass(frozen=True)
class Recording:
    """One traced step at one micro-batch: by phase, what was made and given up.

    Reduction and update do not depend on the micro-batch: a second recording may leave them out.
    """

    micro_batch: int
    phases: dict[str, Events]
    work: Work
    batch_bytes: int
    largest_elements: int = 0
    """Elements of the largest tensor: where they pass 2**31, code may go another way."""


@dataclass(frozen=True)
class Held:
    """Bytes of each storage that outlives a step."""

    model: Sequence[int]
    """Parameters, buffers, DDP's buckets: there before the first step."""
    optimizer: Sequence[int] = ()
    """The optimizer's state, made before the first step (`gatrain.train.optimizer_state.prime`)."""
    workspace: int = 0
    """What cuBLAS takes for each thread that uses it."""
    gradients: Sequence[int] = ()
    """Of parameters that train: zeros stand for them while the optimizer's state is made."""


@dataclass(frozen=True)
class Peak:
    """Largest use of the allocator's memory in a step, in bytes."""

    allocated: int
    reserved: int


class LinearStep:
    """A step whose storages are straight lines in the micro-batch.

    Args:
        low: a recording with all phases.
        high: another size's first phase at least; None reads ``low`` alone.

    Raises:
        ValueError: their events differ, so the model does different things at the two sizes.
    """

    def __init__(self, low: Recording, high: Recording | None = None) -> None:
        high = _shrunk(low) if high is None else high
        if not same_events(low, high):
            raise ValueError(f"micro-batches {low.micro_batch} and {high.micro_batch} do different things")
        self.low, self.high = low, high
        self.micro_step = list(_lines(low, high))
        self.reduce, self.update = low.phases.get(REDUCE, []), low.phases.get(UPDATE, [])
        self._batch = _line(low.micro_batch, low.batch_bytes, high.micro_batch, high.batch_bytes)

    @property
    def may_be_curved(self) -> bool:
        """Whether a large storage is neither of one size nor in proportion to the micro-batch, so that what lies
        between the two recordings may be off their line."""
        size = max(self.low.micro_batch, self.high.micro_batch)
        return any(
            not mark and slope != 0 and abs(fixed) > max(CURVED_BYTES, CURVED_SHARE * abs(slope) * size)
            for _, mark, fixed, slope in self.micro_step
        )

    def agrees_with(self, other: LinearStep, micro_batch: int) -> bool:
        """Whether no large storage differs between two readings of the same events at a size."""
        pairs = zip(_at(self.micro_step, micro_batch), _at(other.micro_step, micro_batch), strict=True)
        return all(abs(a - b) <= max(CURVED_BYTES, CURVED_SHARE * a) for (_, a), (_, b) in pairs)

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

    def batch_bytes(self, micro_batch: int) -> int:
        """Bytes of one batch."""
        fixed, slope = self._batch
        return round(fixed + slope * micro_batch)

    def peak(self, micro_batch: int, held: Held, *, accumulates: bool) -> Peak:
        """Peak of a process that trains at this size.

        Args:
            accumulates: several micro-steps in a step, so that gradients live while activations do.
        """
        return Replay(held).peak(self, micro_batch, accumulates=accumulates)


class Replay:
    """One process on a model of the allocator."""

    def __init__(self, held: Held) -> None:
        self._allocator = CachingAllocator()
        self._held = held
        self._live: dict[int, Block | None] = {}
        self._gradients: set[int] = set()
        self._workspaces: set[int] = set()
        for size in held.model:
            self._allocator.allocate(size)
        zeros = [self._allocator.allocate(size) for size in held.gradients]
        for size in held.optimizer:
            self._allocator.allocate(size)
        for block in zeros:
            self._allocator.free(block)

    def peak(self, step: LinearStep, micro_batch: int, *, accumulates: bool) -> Peak:
        """Run the first steps at a size, after the cache of what made the state was given back."""
        self._allocator.empty_cache()
        micro_step = _at(step.micro_step, micro_batch)
        for _ in range(STEPS):
            self._micro_step(micro_step)
            if accumulates:
                self._micro_step(micro_step)
            self._run(step.reduce)
            self._run(step.update)
            self._end_step()
        copies = CachingAllocator()  # batches arrive on another stream, one ahead of its use
        for _ in range(2 if accumulates else 1):
            copies.allocate(step.batch_bytes(micro_batch))
        peak = self._allocator
        return Peak(peak.peak_allocated + copies.peak_allocated, peak.peak_reserved + copies.peak_reserved)

    def _micro_step(self, events: Events) -> None:
        """Forward and backward. Gradients that are there already are added to, and the new ones given up."""
        before, self._live = self._live, {}
        kept, self._gradients = self._gradients, set()
        self._run(events, frees_gradients=bool(kept))
        for number, block in before.items():
            if number in self._live:  # a sum of losses takes the place of the last one
                self._allocator.free(block)
            else:
                self._live[number] = block
        self._gradients |= kept

    def _run(self, events: Events, *, frees_gradients: bool = False) -> None:
        live, allocator = self._live, self._allocator
        for number, size in events:
            if size >= 0:
                if number not in live:
                    live[number] = allocator.allocate(size)
            elif size == WORKSPACE:
                if number not in self._workspaces:
                    self._workspaces.add(number)
                    allocator.allocate(self._held.workspace)
            elif size == GRADIENT and not frees_gradients:
                self._gradients.add(number)
            elif number in live:
                allocator.free(live.pop(number))

    def _end_step(self) -> None:
        """The last small scalars live until the next step replaces them."""
        for block in self._live.values():
            self._allocator.free(block)
        self._live, self._gradients = {}, set()


def _at(lines: Iterable[Line], micro_batch: int) -> Events:
    return [
        (number, mark or max(0, round(fixed + slope * micro_batch))) for number, mark, fixed, slope in lines
    ]


def same_events(first: Recording, second: Recording) -> bool:
    """Whether two recordings do the same things in the same order, whatever their sizes."""
    return _marks(first) == _marks(second) and len(first.work.products) == len(second.work.products)


def _marks(recording: Recording) -> list[tuple[int, int]]:
    return [(number, min(size, 0)) for number, size in recording.phases[MICRO_STEP]]


def _lines(low: Recording, high: Recording) -> Iterator[Line]:
    for (number, size), (_, other) in zip(low.phases[MICRO_STEP], high.phases[MICRO_STEP], strict=True):
        line = (0.0, 0.0) if size < 0 else _line(low.micro_batch, size, high.micro_batch, other)
        yield number, min(size, 0), *line


def _shrunk(recording: Recording) -> Recording:
    """A recording as it would be at another size, if what its size divides grew with the batch."""
    size, other = recording.micro_batch, 1 if recording.micro_batch > 1 else 2

    def scaled(count: int) -> int:
        return count if count < 0 or count % size else count // size * other

    events = [(number, scaled(count)) for number, count in recording.phases[MICRO_STEP]]
    work, part = recording.work, other / size
    constants = work.constants or [0.0] * len(work.products)
    products = [
        (flops * part, constant + part * (moved - constant))
        for (flops, moved), constant in zip(work.products, constants, strict=True)
    ]
    others = work.other_constant + part * (work.other_bytes - work.other_constant)
    small = Work(products, others, work.other_kernels)
    return Recording(other, {MICRO_STEP: events}, small, recording.batch_bytes // size * other)


def _line(low: int, low_bytes: float, high: int, high_bytes: float) -> tuple[float, float]:
    slope = (high_bytes - low_bytes) / (high - low)
    return low_bytes - slope * low, slope
