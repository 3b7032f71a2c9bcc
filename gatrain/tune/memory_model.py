"""Peak memory as a line over the micro-batch, fitted to what was measured. Pure functions, no torch.

    peak(b) = max(a + c * b, level)

Activations grow with the samples. At small sizes the peak may instead be the update's, which does not depend on
the size: those points are level and are left out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RISE = 1.01
"""Points whose successor is not higher than this factor are level."""
LAST_POINTS = 4
"""The largest sizes say most about the next."""
STEP_ERROR = 0.10
"""Part of the extrapolated growth that a line through two points may be wrong by: workspaces and the rounding of
the allocator do not grow in proportion."""


@dataclass(frozen=True)
class MemoryLine:
    """``intercept + slope * size`` bytes, with the fit's error at the sizes that it was fitted to."""

    intercept: float
    slope: float
    largest: int
    """The largest size that was measured."""
    residual: float
    """Largest distance of a fitted point from the line, in bytes."""

    def peak(self, size: int) -> float:
        """Predicted peak bytes."""
        return self.intercept + self.slope * size

    def error(self, size: int) -> float:
        """Bytes by which `peak` may be wrong: the fit's own misses, and a part of what is extrapolated."""
        return self.residual + STEP_ERROR * self.slope * max(0, size - self.largest)

    def clearly_exceeds(self, size: int, budget_bytes: int) -> bool:
        """Whether ``size`` cannot fit even if the line is as wrong as it may be; in doubt a size is tried."""
        return self.peak(size) - self.error(size) > budget_bytes


def fit_line(points: Sequence[tuple[int, int]]) -> MemoryLine | None:
    """Least squares over the rising end of (size, peak bytes) points; None where they say nothing.

    Sizes in any order; at least two points that rise are needed.
    """
    rising = sorted(points)
    while len(rising) > 2 and rising[1][1] <= RISE * rising[0][1]:
        rising = rising[1:]
    rising = rising[-LAST_POINTS:]
    if len(rising) < 2:
        return None
    mean_size = math.fsum(size for size, _ in rising) / len(rising)
    mean_peak = math.fsum(peak for _, peak in rising) / len(rising)
    spread = math.fsum((size - mean_size) ** 2 for size, _ in rising)
    if spread == 0:
        return None
    slope = math.fsum((size - mean_size) * (peak - mean_peak) for size, peak in rising) / spread
    slope = max(0.0, slope)
    intercept = mean_peak - slope * mean_size
    residual = max(abs(peak - (intercept + slope * size)) for size, peak in rising)
    return MemoryLine(intercept, slope, rising[-1][0], residual)


def between(fits: int, refused: int, smallest_gap: int) -> int | None:
    """The size to try between one that fits and one that does not; None where the gap is not worth a trial.

    A multiple of eight where the gap leaves room for one, as GPUs like their shapes.
    """
    if refused - fits < max(smallest_gap, math.ceil(0.1 * fits)):
        return None
    middle = (fits + refused) // 2
    if refused - fits >= 32:
        middle -= middle % 8
    return middle if fits < middle < refused else None
