"""What parent and tracing process say to each other, and the peaks that follow. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from gatrain import batch
from gatrain.config import RunConfig
from gatrain.predict.timeline import Held, LinearStep, Peak, Recording, Work

CONFIG, REQUEST = "config.yaml", "request.json"


@dataclass(frozen=True)
class TraceRequest:
    """What to trace: one precision, some modes of checkpointing; always uncompiled code."""

    precision: str
    modes: list[str]
    world_size: int
    sync: str
    share: int
    """Samples of the busiest rank: no larger micro-batch is of use."""
    memory_bytes: int
    """Of the largest GPU in question: no larger peak is of use."""
    fixed: int | None = None
    """A micro-batch that is fixed by the user."""

    def largest_of_use(self, step: LinearStep, held: Held) -> int:
        """The size at which a second trace says most: the largest that could be planned."""
        if self.fixed is not None:
            return self.fixed

        def fits(size: int) -> bool:
            return step.peak(size, held, accumulates=True).allocated <= self.memory_bytes

        return max(1, largest(self.share, fits))


def request_for(config: RunConfig, memory_bytes: int, world_size: int, precision: str) -> TraceRequest:
    """What a configuration asks of a GPU."""
    mode = config.checkpointing
    return TraceRequest(
        precision=precision,
        modes=["none", "selective", "full"] if mode == "auto" else [mode],
        world_size=world_size,
        sync="window" if config.sync == "auto" else config.sync,
        share=batch.Split(config.batch.largest, world_size).share,
        memory_bytes=memory_bytes,
        fixed=config.batch.micro if isinstance(config.batch.micro, int) else None,
    )


@dataclass(frozen=True)
class Piece:
    """Recordings that hold from micro-batch ``start`` on. Without ``high``, ``low`` stands alone: it is at the
    one size in question or at a prime size."""

    start: int
    low: Recording
    high: Recording | None

    @cached_property
    def step(self) -> LinearStep:
        return LinearStep(self.low, self.high)


@dataclass(frozen=True)
class ModeTrace:
    """One mode of checkpointing at every micro-batch."""

    mode: str
    model: list[int]
    """Bytes of each parameter, buffer and DDP bucket."""
    optimizer: list[int]
    """Bytes of each tensor of the optimizer's state."""
    pieces: list[Piece]
    straightness: float | None
    """How far, relatively, a trace between two others was from their line; 0 where every storage is of one size
    or in proportion to the micro-batch, None where a single size was asked for."""
    seconds: float
    gradients: list[int]
    """Bytes of each parameter that trains."""

    @property
    def persistent(self) -> list[int]:
        """Bytes of each storage that outlives a step."""
        return [*self.model, *self.optimizer]

    @property
    def is_regular(self) -> bool:
        """Whether one size would have told all: what a prime divides grows with the batch, nothing else does."""
        return all(
            piece.high is not None and LinearStep(piece.low).agrees_with(piece.step, piece.high.micro_batch)
            for piece in self.pieces[:1]
        )

    def peak(self, micro_batch: int, workspace: int, *, accumulates: bool) -> Peak:
        """Peak of the allocator's memory in a process that trains at this size.

        Args:
            workspace: bytes that cuBLAS takes for each thread that uses it.
        """
        asked = micro_batch, workspace, accumulates
        if asked not in self._peaks:
            held = Held(self.model, self.optimizer, workspace, self.gradients)
            self._peaks[asked] = self._step(micro_batch).peak(micro_batch, held, accumulates=accumulates)
        return self._peaks[asked]

    def work(self, micro_batch: int) -> Work:
        """Work of one micro-step."""
        return self._step(micro_batch).work(micro_batch)

    @cached_property
    def _peaks(self) -> dict[tuple[int, int, bool], Peak]:
        return {}

    def _step(self, micro_batch: int) -> LinearStep:
        return [piece for piece in self.pieces if piece.start <= micro_batch][-1].step


@dataclass(frozen=True)
class TraceResult:
    """All that the tracing process found."""

    parameters: int
    gradient_bytes: int
    offered: list[str]
    """Modes of checkpointing that the model has."""
    traces: list[ModeTrace]
    lengths: list[float] = field(default_factory=list)
    """Lengths of the samples as parts of the longest, at equal steps of their order; empty where they are alike."""
    passes: float = 1.0
    """What the gradient strategy computes for each micro-batch, in traced micro-steps."""

    def usual_length(self, micro_batch: int) -> float:
        """What part of the longest sample's length, which is the traced one, a batch of random samples has: as
        long as its longest."""
        count = len(self.lengths)
        if not count:
            return 1.0
        ends = [(nth / count) ** micro_batch for nth in range(count + 1)]
        shares = (above - below for below, above in pairwise(ends))
        return sum(part * share for part, share in zip(self.lengths, shares, strict=True))


def largest(limit: int, fits: Any) -> int:
    """The largest whole number up to ``limit`` that fits, 0 if not even 1 does; fitting ends once."""
    if fits(limit):
        return limit
    below, above = 0, limit
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below
