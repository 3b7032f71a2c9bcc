"""When a state is due by time: so early that a kill at any moment loses at most the limit, writing included."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_SHARE = 0.5
"""Part of the limit after which the first state is written: how long writing takes is not yet known."""
UNKNOWN_SHARE = 0.1
"""Part of the limit after which a state is written ahead of an evaluation of unknown length."""
MARGIN = 1.25
"""Writing, evaluations and steps may take this much longer than the longest one so far."""
RECENT_STEPS = 8


@dataclass
class SaveClock:
    """Rank 0's clock; its wish goes to all ranks with the counts of a window. Times are in seconds.

    Args:
        limit_s: work that may be lost; 0 never asks for a state.
        now: a monotonic clock.
    """

    limit_s: float
    now: Callable[[], float] = time.monotonic
    write_s: float | None = None
    """Longest writing of a state so far."""
    evaluation_s: float | None = None
    """Longest evaluation so far."""
    _kept_at: float = field(init=False)
    """When the work was done that cannot be lost any more."""
    _wait_until: float = field(init=False, default=float("-inf"))
    _asked_at: float | None = field(init=False, default=None)
    _steps_s: collections.deque[float] = field(
        init=False, default_factory=lambda: collections.deque(maxlen=RECENT_STEPS)
    )

    def __post_init__(self) -> None:
        self._kept_at = self.now()

    def is_due(self, *, before_evaluation: bool) -> bool:
        """Whether a state must be written after the step that begins now. Called once a step.

        Args:
            before_evaluation: an evaluation follows the step, during which no state can be written.
        """
        now = self.now()
        if self._asked_at is not None:
            self._steps_s.append(now - self._asked_at)
        self._asked_at = now
        if not self.limit_s or now < self._wait_until:
            return False
        lost_s = now - self._kept_at + MARGIN * max(self._steps_s, default=0.0)
        if before_evaluation:
            if self.evaluation_s is None:
                return lost_s >= UNKNOWN_SHARE * self.limit_s
            # the next chance comes a step after the evaluation
            lost_s += MARGIN * (self.evaluation_s + max(self._steps_s, default=0.0))
        if self.write_s is None:
            return lost_s >= FIRST_SHARE * self.limit_s
        return lost_s + MARGIN * self.write_s >= self.limit_s

    def pause(self) -> None:
        """What came since the last step is no step: it was a save or an evaluation."""
        self._asked_at = None

    def saved(self, began: float) -> None:
        """A state of the work done until ``began`` is on the disk."""
        now = self.now()
        self._kept_at = began
        self.write_s = max(now - began, self.write_s or 0.0)
        self._wait_until = now + self.write_s  # a disk too slow for the limit must not take all the time
        self.pause()

    def failed(self) -> None:
        """A state could not be written; the next attempt waits a tenth of the limit."""
        self._wait_until = self.now() + UNKNOWN_SHARE * self.limit_s
        self.pause()

    def evaluated(self, began: float) -> None:
        """An evaluation took the time since ``began``."""
        self.evaluation_s = max(self.now() - began, self.evaluation_s or 0.0)
        self.pause()

    def is_too_slow(self) -> bool:
        """Whether writing takes so long that the limit cannot be kept."""
        return bool(self.limit_s) and (self.write_s or 0.0) * (1 + MARGIN) > self.limit_s
