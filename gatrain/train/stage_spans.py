"""Where the stages of the effective batch lie among the windows of a run, by arithmetic alone.

A stage begins with the first window that starts at or after its place. Windows follow one another in the epoch's
order of samples without a gap, so no sample is lost or doubled where the stage changes; the last window of an epoch
is short (or left out, with ``drop_last``), whatever the stage. The number of a window says all of it: nothing is
counted while training, and a run goes on in the middle of a stage from that number alone.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from gatrain.batch_stages import BatchStages


@dataclass(frozen=True)
class Place:
    """Where a window lies: positions ``first`` to ``last`` - 1 of an epoch's order."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class Span:
    """The windows of one stage, from window ``index`` on, which begins at ``position`` of ``epoch``."""

    effective_batch: int
    samples: int
    """Positions of an epoch."""
    drop_last: bool
    index: int = 0
    epoch: int = 0
    position: int = 0
    consumed: int = 0
    """Samples of all windows before."""

    def _windows(self, positions: int) -> int:
        """Windows of so many positions to the end of an epoch."""
        return positions // self.effective_batch if self.drop_last else -(-positions // self.effective_batch)

    @property
    def in_first(self) -> int:
        """Windows in the rest of the epoch in which the stage begins."""
        return self._windows(self.samples - self.position)

    @property
    def per_epoch(self) -> int:
        return self._windows(self.samples)

    def place(self, index: int) -> Place:
        """Of window ``index`` of the run, which is of this stage."""
        nth = index - self.index
        if nth < self.in_first:
            epoch, first = self.epoch, self.position + nth * self.effective_batch
        else:
            later, nth = divmod(nth - self.in_first, self.per_epoch)
            epoch, first = self.epoch + 1 + later, nth * self.effective_batch
        return Place(epoch, first, min(first + self.effective_batch, self.samples))

    def consumed_before(self, index: int) -> int:
        """Samples of all windows of the run before ``index``."""
        nth = index - self.index
        in_first, each = self._given(self.samples - self.position), self._given(self.samples)
        if nth <= self.in_first:
            return self.consumed + min(nth * self.effective_batch, in_first)
        later, nth = divmod(nth - self.in_first, self.per_epoch)
        return self.consumed + in_first + later * each + min(nth * self.effective_batch, each)

    def _given(self, positions: int) -> int:
        """Samples of all windows of so many positions to the end of an epoch."""
        return positions - positions % self.effective_batch if self.drop_last else positions

    def first_after_samples(self, samples: int) -> int:
        """Index of the first window of the run before which at least so many samples were given."""
        wanted = samples - self.consumed
        in_first, each = self._given(self.samples - self.position), self._given(self.samples)
        if wanted <= in_first:
            return self.index + -(-max(0, wanted) // self.effective_batch)
        epochs, rest = divmod(wanted - in_first - 1, each)
        return self.index + self.in_first + epochs * self.per_epoch + -(-(rest + 1) // self.effective_batch)

    def first_after_epochs(self, epochs: float) -> int:
        """Index of the first window of the run that starts so many epochs after the beginning, or later."""
        epoch, position = _epochs(epochs, self.samples)
        if (epoch, position) <= (self.epoch, self.position):
            return self.index
        if epoch == self.epoch:
            return self.index + min(-(-(position - self.position) // self.effective_batch), self.in_first)
        later = self.in_first + (epoch - self.epoch - 1) * self.per_epoch
        return self.index + later + min(-(-position // self.effective_batch), self.per_epoch)

    def end_before(self, index: int) -> tuple[int, int]:
        """(epoch, position) that the windows before ``index`` have come to."""
        if index == self.index:
            return self.epoch, self.position
        place = self.place(index - 1)
        return (place.epoch + 1, 0) if place.last == self.samples else (place.epoch, place.last)


def _epochs(epochs: float, samples: int) -> tuple[int, int]:
    """The epoch and the first position in it that is not before so many epochs."""
    exact = Fraction(str(epochs))  # 0.1 is a tenth
    epoch = math.floor(exact)
    position = math.ceil((exact - epoch) * samples)
    return (epoch + 1, 0) if position == samples else (epoch, position)


FirstAfterTokens = Callable[[Span, int], int]
"""Index of the first window of the run before which at least so many tokens were given."""


def spans_of(
    stages: BatchStages, samples: int, drop_last: bool, tokens: FirstAfterTokens | None = None
) -> list[Span]:
    """The span of each stage, in order. A stage that another follows before its first window has none of its own.

    Args:
        stages: the effective batch over the run.
        samples: positions of an epoch, at least as many as the largest effective batch.
        tokens: finds the place of stages that begin at tokens.
    """
    spans = [Span(stages.first, samples, drop_last)]
    for start, effective in list(stages)[1:]:
        before = spans[-1]
        if stages.by == "samples":
            index = before.first_after_samples(int(start))
        elif stages.by == "epochs":
            index = before.first_after_epochs(start)
        elif stages.by == "tokens":
            assert tokens is not None
            index = tokens(before, int(start))
        else:
            index = int(start)
        epoch, position = before.end_before(index)
        if stages.by == "epochs" and (epoch, position) < _epochs(start, samples):
            epoch, position = epoch + 1, 0  # the samples that an epoch leaves out are before that place
        spans.append(
            Span(effective, samples, drop_last, index, epoch, position, before.consumed_before(index))
        )
    return spans


def span_at(spans: list[Span], index: int) -> int:
    """Number of the stage that window ``index`` is of."""
    return bisect.bisect_right(spans, index, key=lambda span: span.index) - 1
