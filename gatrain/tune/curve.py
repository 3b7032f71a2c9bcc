"""What was measured with one `StepSettings`: a curve of `gatrain.plan.Measurement` over micro-batch sizes.

Nothing here depends on the effective batch, so a stored curve answers for every effective batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gatrain import schema
from gatrain.plan import FITS, Measurement, StepSettings

SHARE, MEMORY, TIME, SLOWER, LEVEL, BROKEN, INTERRUPTED = (
    "share",
    "memory",
    "time",
    "slower",
    "level",
    "broken",
    "interrupted",
)
"""Why a curve ends where it does: all sizes asked for were tried; the next did not fit; time ran out; larger
sizes were slower, or no faster; sizes crashed; a person stopped it."""
WORTH_TRIALS = 0.03
"""Part of the time that larger sizes must promise to be tried for a larger effective batch."""
DIFFERS = 0.20
"""Repeats of one size that differ by more than this part are measured again, and so is a size that takes by so much
longer than a larger one."""
FAR_FACTOR = 2.0
"""Factor by which a size may take longer per sample than a smaller one before it is measured again."""
UNEQUAL, UNEQUAL_SIZES = 0.10, 3
"""Ranks whose micro-step times differ by more than this part, at each of so many sizes, are unequal."""


def doubtful(measurements: Iterable[Measurement], far: float = FAR_FACTOR) -> list[int]:
    """Sizes whose time the others contradict, smallest first: one that takes longer than a larger size, or longer
    per sample than a smaller one by the factor ``far``. Disturbances only add, so the longer time is in doubt."""
    points = sorted(
        (m.micro_batch, m.micro_step_s) for m in measurements if m.outcome == FITS and m.micro_step_s
    )
    return [
        size
        for size, seconds in points
        if any(
            seconds > (1 + DIFFERS) * other_s if size < other else seconds > far * size / other * other_s
            for other, other_s in points
            if other != size
        )
    ]


@dataclass(frozen=True)
class KnobOffer:
    """A further knob (`gatrain.train.knobs`) that the trial processes can set."""

    name: str
    values: tuple[bool | int | float | str, ...]
    words: str


@dataclass(frozen=True)
class Curve:
    """All sizes measured with one `StepSettings`, smallest first, and why there are no larger ones."""

    settings: StepSettings
    measurements: tuple[Measurement, ...] = ()
    stopped: str = INTERRUPTED
    max_seconds: float = 0.0
    """The time that was allowed, for a curve that ended for want of it."""
    modes: tuple[str, ...] = field(default=("none",))
    """Checkpointing modes that the model offers."""
    knobs: tuple[KnobOffer, ...] = ()
    """Further knobs that the run has."""
    budget_bytes: int | None = None
    """Memory that the weakest rank's process was allowed when this was measured."""

    @property
    def fitting(self) -> list[Measurement]:
        """The sizes that fit, smallest first."""
        return [m for m in self.measurements if m.outcome == FITS and m.micro_step_s is not None]

    @property
    def unusable(self) -> set[int]:
        """Sizes known not to work: they may not appear in a split, not even as its smaller size."""
        return {m.micro_batch for m in self.measurements if m.outcome != FITS}

    def micro_step_s(self, size: int) -> float:
        """Seconds of one micro-step of ``size`` samples, on the line between its measured neighbours.

        Below the smallest measured size its time is taken as it is: a micro-step has a fixed cost.

        Raises:
            ValueError: ``size`` is above the largest size that fits.
        """
        points = [(m.micro_batch, m.micro_step_s or 0.0) for m in self.fitting]
        if not points or size > points[-1][0]:
            raise ValueError(f"no measurement at or above {size}")
        if size <= points[0][0]:
            return points[0][1]
        upper = next(index for index, (measured, _) in enumerate(points) if measured >= size)
        (low, low_s), (high, high_s) = points[upper - 1], points[upper]
        return low_s + (high_s - low_s) * (size - low) / (high - low)

    def peak_bytes(self, size: int) -> int | None:
        """Peak memory at ``size``, on the line between its measured neighbours; None where not known.

        A step of this size may also compute a smaller one, which needs less.
        """
        below = [m for m in self.fitting if m.micro_batch <= size and m.peak_memory_bytes is not None]
        above = [m for m in self.fitting if m.micro_batch >= size and m.peak_memory_bytes is not None]
        if not above:
            return None
        high = above[0]
        low = below[-1] if below else high
        low_bytes, high_bytes = low.peak_memory_bytes or 0, high.peak_memory_bytes or 0
        if low.micro_batch == high.micro_batch:
            return high_bytes
        part = (size - low.micro_batch) / (high.micro_batch - low.micro_batch)
        return round(low_bytes + (high_bytes - low_bytes) * part)

    @property
    def rank_factors(self) -> tuple[float, ...]:
        """Each rank's micro-step time as a part of the slowest's; empty where ranks are as good as equal.

        Unequal are ranks that differ by more than `UNEQUAL` at every one of the largest sizes, the slowest
        always among the same: anything less is noise.
        """
        rows = [m.rank_s for m in self.fitting[-UNEQUAL_SIZES:] if len(m.rank_s) > 1 and min(m.rank_s) > 0]
        if len(rows) < UNEQUAL_SIZES or len(set(map(len, rows))) != 1:
            return ()
        slowest = {row.index(max(row)) for row in rows}
        if any(max(row) <= (1 + UNEQUAL) * min(row) for row in rows):
            return ()
        medians = [statistics.median(row[rank] / max(row) for row in rows) for rank in range(len(rows[0]))]
        factors = tuple(each / max(medians) for each in medians)
        # equally slow ranks may take turns at being slowest
        return factors if all(factors[rank] > 1 / (1 + UNEQUAL) for rank in slowest) else ()

    @property
    def step_overhead_s(self) -> float:
        """Seconds of reduction and update: the median over all sizes, for neither depends on the size."""
        return self._median("reduce_s") + self._median("optimizer_s")

    def _median(self, name: str) -> float:
        values = [value for m in self.fitting if (value := getattr(m, name)) is not None]
        return statistics.median(values) if values else 0.0

    def answers(self, sizes: Sequence[int], max_seconds: float) -> bool:
        """Whether measuring ``sizes``, rising, within ``max_seconds`` would teach nothing new."""
        if not self.fitting or min(sizes) < self.measurements[0].micro_batch:
            return False  # a machine that was full, or code that crashed, may be better now
        if self.stopped == INTERRUPTED or (self.stopped == TIME and max_seconds > self.max_seconds):
            return False
        if self.stopped in (MEMORY, SLOWER, LEVEL, TIME, BROKEN):
            return True
        return max(sizes) <= self.largest or self.possible_gain < WORTH_TRIALS

    @property
    def largest(self) -> int:
        """The largest size that was tried, whatever came of it; 0 without any."""
        return max((m.micro_batch for m in self.measurements), default=0)

    @property
    def possible_gain(self) -> float:
        """The part of the time per sample that larger sizes could save at most: what does not grow with the size,
        by the flattest of the lines through the last sizes."""
        points = [(m.micro_batch, m.micro_step_s or 0.0) for m in self.fitting[-3:]]
        if len(points) < 2 or points[-1][1] <= 0:
            return 1.0
        size, seconds = points[-1]
        slope = min((seconds - low_s) / (size - low) for low, low_s in points[:-1])
        return max(0.0, 1 - slope * size / seconds)

    def with_new(self, other: Curve) -> Curve:
        """This curve with the measurements of a later process; where both have a size, the later counts."""
        merged = {m.micro_batch: m for m in (*self.measurements, *other.measurements)}
        return dataclasses.replace(
            other,
            measurements=tuple(merged[size] for size in sorted(merged)),
            modes=max(self.modes, other.modes, key=len),
            knobs=other.knobs or self.knobs,
            budget_bytes=other.budget_bytes if other.budget_bytes is not None else self.budget_bytes,
        )

    def check(self) -> None:
        """
        Raises:
            ValueError: a limit that nobody has set.
        """
        schema.at_least(0, max_seconds=self.max_seconds, budget_bytes=self.budget_bytes)
