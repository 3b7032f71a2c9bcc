"""Windows of a number of tokens: as many whole samples, in the order of the epoch, as fit into the budget.

Where each ends follows from the samples' lengths, which are known beforehand, so the windows are the same for
every world size and split, and a run goes on from the number of its window as any other. The last window of an
epoch holds what is left. Finding window ``n`` looks through the lengths of the epochs before it once.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gatrain.errors import ConfigError, DataError
from gatrain.train.stage_spans import Span
from gatrain.train.token_places import Lengths
from gatrain.train.windows import Window, WindowSchedule

Edges = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenWindows(WindowSchedule):
    """``effective_batch`` is the number of samples that a window has on average.

    Args:
        budget: tokens that a window holds at most.
        lengths: tokens of each sample, or of every one.

    Raises:
        ConfigError: a sample has no token, or more than the budget.
        DataError: all samples together do not fill a window.
    """

    budget: int = 0
    lengths: int | Lengths = 0
    _counts: list[int] = field(default_factory=list, repr=False, compare=False)
    """Windows of each epoch so far."""
    _edges: dict[int, Edges] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        shortest, longest, total = int(np.min(self.lengths)), int(np.max(self.lengths)), self._total
        if longest > self.budget or shortest < 1:
            which = int(np.argmax(self.lengths) if longest > self.budget else np.argmin(self.lengths))
            found = longest if longest > self.budget else shortest
            raise ConfigError(
                f"batch.effective={self.budget} with batch.count=tokens: the sample {which} has {found} tokens, "
                f"and a window holds 1 to {self.budget}. "
                + (f"Use batch.effective={longest} or more." if longest > self.budget else "Leave it out.")
            )
        if total < self.budget:
            raise DataError(
                f"the training data has {total:,} tokens, fewer than batch.effective={self.budget} with "
                f"batch.count=tokens: no window could be filled. Use batch.effective={total} or less, or more data."
            )

    @property
    def _total(self) -> int:
        return self.lengths * self.samples if isinstance(self.lengths, int) else int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Differs where the windows do."""
        crc = zlib.crc32(np.atleast_1d(np.asarray(self.lengths, dtype=np.int64)).tobytes())
        return f"{self.budget} tokens of lengths {crc:08x}"

    def edges(self, epoch: int) -> Edges:
        """Positions in the order of an epoch at which its windows begin, and the end of the last one."""
        if epoch not in self._edges:
            if len(self._edges) > 1:
                self._edges.clear()  # those of a run in order are asked for again and again
            self._edges[epoch] = self._cut(epoch)
        return self._edges[epoch]

    def _cut(self, epoch: int) -> Edges:
        if isinstance(self.lengths, int):
            each = self.budget // self.lengths
            found = [*range(0, self.samples, each), self.samples]
        else:
            sums = np.concatenate([[0], np.cumsum(self.lengths[self.ids(epoch, 0, self.samples)])])
            found = [0]
            while found[-1] < self.samples:  # the last place whose sum is within the budget
                found.append(int(np.searchsorted(sums, sums[found[-1]] + self.budget, side="right")) - 1)
        if self.drop_last and len(found) > 2:
            found.pop()
        return np.array(found, dtype=np.int64)

    def _windows_of(self, epoch: int) -> int:
        while len(self._counts) <= epoch:
            self._counts.append(len(self.edges(len(self._counts))) - 1)
        return self._counts[epoch]

    def window(self, index: int) -> Window:
        epoch, nth = 0, index
        while nth >= (count := self._windows_of(epoch)):
            epoch, nth = epoch + 1, nth - count
        first, last = map(int, self.edges(epoch)[nth : nth + 2])
        draws = getattr(self.order, "draws", None)
        if draws is not None:
            draws = draws(epoch, np.arange(first, last, dtype=np.int64))
        return Window(index, epoch, self.ids(epoch, first, last), draws)

    def effective_at(self, index: int) -> int:
        return self.budget

    def full_at(self, index: int) -> int:
        return 0  # how many samples it has says nothing

    @functools.cached_property
    def spans(self) -> list[Span]:
        raise TypeError("windows of tokens have no spans of a fixed number of samples")

    def stage_at(self, index: int) -> int:
        return 0

    def steps(self, steps: int | None, epochs: float | None) -> int:
        if steps is not None:
            return steps
        whole, part = divmod(epochs or 0.0, 1.0)
        full = sum(self._windows_of(epoch) for epoch in range(int(whole)))
        return full + (math.ceil(part * self._windows_of(int(whole))) if part else 0)
