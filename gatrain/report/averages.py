"""What the displays derive from step records: smoothed loss, rates, time left. No clock, no output."""

from __future__ import annotations

import collections

from gatrain.report.text import number
from gatrain.train.events import RunInfo
from gatrain.train.records import StepRecord

_SMOOTHING = 0.9
_RECENT = 50
_HISTORY = 512


class Averages:
    """Sums up the records so far.

    Rates come from the records' own ``samples_per_s``, ``tokens_per_s`` and ``step_s``: records arrive
    several at once, so the moment of arrival says nothing.
    """

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self.step = info.first_step
        self.last: StepRecord | None = None
        self.peak_memory_bytes: int | None = None
        self._sum = self._weight = 0.0
        self._recent: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=_RECENT)
        self._warm = False
        self._history: list[float] = []
        self._stride = 1  # steps averaged in each entry of the history
        self._bin: list[float] = []

    def add(self, record: StepRecord) -> None:
        """Take one step's record."""
        self.last = record
        self.step = record.step
        memory = record.peak_memory_bytes
        if memory:
            self.peak_memory_bytes = max(memory, self.peak_memory_bytes or 0)
        loss = number(record.loss)
        if loss is not None:  # a NaN would stay in every average after it
            self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
            self._remember(loss)
        seconds = number(record.step_s)
        if seconds:
            if len(self._recent) == 1 and not self._warm:
                self._recent.clear()  # the first step compiles and warms up: forget it when there is another
                self._warm = True
            samples = (number(record.samples_per_s) or 0.0) * seconds
            tokens = (number(record.tokens_per_s) or 0.0) * seconds
            self._recent.append((seconds, samples, tokens))

    @property
    def smooth_loss(self) -> float | None:
        """Exponential average of the loss over some ten steps, corrected for its start at zero."""
        return self._sum / self._weight if self._weight else None

    @property
    def step_s(self) -> float | None:
        """Mean seconds of the recent steps."""
        return sum(item[0] for item in self._recent) / len(self._recent) if self._recent else None

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second over the recent steps."""
        return self._per_second(1)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over the recent steps; None where samples have no tokens."""
        return self._per_second(2)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the recent pace."""
        if self.step_s is None:
            return None
        return max(0, self.info.total_steps - self.step) * self.step_s

    def losses(self) -> list[float]:
        """Loss over the steps of this process, averaged to at most some hundred equal bins."""
        rest = [sum(self._bin) / len(self._bin)] if self._bin else []
        return self._history + rest

    def _per_second(self, column: int) -> float | None:
        amount = sum(item[column] for item in self._recent)
        return amount / sum(item[0] for item in self._recent) if amount else None

    def _remember(self, loss: float) -> None:
        self._bin.append(loss)
        if len(self._bin) < self._stride:
            return
        self._history.append(sum(self._bin) / len(self._bin))
        self._bin.clear()
        if len(self._history) == _HISTORY:  # bounded memory: halve the resolution
            pairs = zip(self._history[::2], self._history[1::2], strict=True)
            self._history = [(first + second) / 2 for first, second in pairs]
            self._stride *= 2
