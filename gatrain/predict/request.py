"""What parent and tracing process say to each other, and the peaks that follow. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gatrain.predict.timeline import LinearStep, Peak, Recording, Work

CONFIG, REQUEST, RESULT = "config.yaml", "request.json", "result.json"


@dataclass(frozen=True)
class TraceRequest:
    """What to trace: one precision, compiled or not, some modes of checkpointing."""

    precision: str
    compile: bool
    modes: list[str]
    world_size: int
    sync: str
    share: int
    """Samples of the busiest rank: no larger micro-batch is of use."""
    memory_bytes: int
    """Of the largest GPU in question: no larger peak is of use."""
    fixed: int | None = None
    """A micro-batch that is fixed by the user."""

    def largest_of_use(self, step: LinearStep, persistent: Iterable[int]) -> int:
        """The size at which a third trace says most: the largest that could be planned."""
        held = list(persistent)
        if self.fixed is not None:
            return self.fixed
        return max(
            1,
            largest(
                self.share, lambda b: step.peak(b, held, accumulates=True).allocated <= self.memory_bytes
            ),
        )


@dataclass(frozen=True)
class Piece:
    """Recordings that hold from micro-batch ``start`` on. Without ``high``, ``low`` is at a prime size."""

    start: int
    low: Recording
    high: Recording | None

    @cached_property
    def step(self) -> LinearStep:
        return LinearStep.proportional(self.low) if self.high is None else LinearStep(self.low, self.high)


@dataclass(frozen=True)
class ModeTrace:
    """One mode of checkpointing at every micro-batch."""

    mode: str
    persistent: list[int]
    """Bytes of each parameter, buffer, optimizer state and DDP bucket."""
    pieces: list[Piece]
    straightness: float | None
    """How far, relatively, the straight line was from the trace at the largest size; None without a check."""
    seconds: float

    def peak(self, micro_batch: int, workspaces: Iterable[int], *, accumulates: bool) -> Peak:
        """Peak of the allocator's memory in a step."""
        held = [*self.persistent, *workspaces]
        return self._piece(micro_batch).step.peak(micro_batch, held, accumulates=accumulates)

    def work(self, micro_batch: int) -> Work:
        """Work of one micro-step."""
        return self._piece(micro_batch).step.work(micro_batch)

    def _piece(self, micro_batch: int) -> Piece:
        return [piece for piece in self.pieces if piece.start <= micro_batch][-1]


@dataclass(frozen=True)
class TraceResult:
    """All that the tracing process found."""

    parameters: int
    gradient_bytes: int
    offered: list[str]
    """Modes of checkpointing that the model has."""
    traces: list[ModeTrace]

    def to_dict(self) -> dict[str, Any]:
        data = {"parameters": self.parameters, "gradient_bytes": self.gradient_bytes, "offered": self.offered}
        traces = [
            {
                "mode": trace.mode,
                "persistent": trace.persistent,
                "pieces": [
                    [p.start, p.low.to_dict(), None if p.high is None else p.high.to_dict()]
                    for p in trace.pieces
                ],
                "straightness": trace.straightness,
                "seconds": trace.seconds,
            }
            for trace in self.traces
        ]
        return {**data, "traces": traces}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TraceResult:
        traces = [
            ModeTrace(
                **{
                    **trace,
                    "pieces": [
                        Piece(
                            start,
                            Recording.from_dict(low),
                            None if high is None else Recording.from_dict(high),
                        )
                        for start, low, high in trace["pieces"]
                    ],
                }
            )
            for trace in data["traces"]
        ]
        known = {field.name for field in dataclasses.fields(cls)} - {"traces"}
        return cls(**{name: data[name] for name in known}, traces=traces)


def largest(limit: int, fits: Any) -> int:
    """The largest whole number up to ``limit`` that fits, 0 if not even 1 does; fitting ends once."""
    if fits(limit):
        return limit
    below, above = 0, limit
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below
