"""Windows: which samples make up optimizer step ``n``, for any world size.

A window depends on (samples, their order, seed, effective batch, n) alone, and is computed by its index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gatrain import batch
from gatrain.batch_stages import BatchStages
from gatrain.errors import DataError
from gatrain.train.order import Ids as Ids
from gatrain.train.order import Order, checked_ids
from gatrain.train.order.permutation import permutation
from gatrain.train.seeding import mix64
from gatrain.train.stage_spans import FirstAfterTokens, Span, span_at, spans_of

MOST_EXACT_PAIRS = 2**20
"""Samples whose `digest` is the same whichever ranks' parts are added as float64."""


def digest(first_position: int, ids: Ids) -> int:
    """Order-dependent fingerprint of part of a window; parts of several ranks add up to the whole's.

    Each (position, id) pair gives 32 bits, so sums of up to `MOST_EXACT_PAIRS` stay exact in float64.
    """
    positions = np.arange(first_position, first_position + len(ids), dtype=np.uint64)
    words = mix64(mix64(ids.astype(np.uint64)) + positions * np.uint64(0x9E3779B97F4A7C15))
    return int((words >> np.uint64(32)).sum())


_BLOCK = 8192


@functools.lru_cache(maxsize=4)
def _block(samples: int, seed: int, epoch: int, first: int, count: int) -> Ids:
    found = permutation(samples, seed, epoch, np.arange(first, min(first + count, samples), dtype=np.int64))
    found.flags.writeable = False  # its windows share it
    return found


@dataclass(frozen=True)
class Window:
    """One optimizer step's samples: ``ids`` of all ranks in order. Short only at the end of an epoch."""

    index: int
    epoch: int
    ids: Ids
    draws: Ids | None = None
    """Numbers that key the augmentation of each, where the epoch does not tell two draws of a sample apart."""

    def keys(self, first: int, count: int) -> list[tuple[int, int]]:
        """(epoch or draw, sample id) of ``count`` samples from position ``first``."""
        ids = self.ids[first : first + count].tolist()
        if self.draws is None:
            return [(self.epoch, sample) for sample in ids]
        return list(zip(self.draws[first : first + count].tolist(), ids, strict=True))

    def slice_of(
        self, rank: int, world_size: int, plan_shares: Sequence[int] | None = None
    ) -> tuple[int, Ids]:
        """This rank's (first position, ids): consecutive, and possibly none of a short window.

        ``plan_shares`` are every rank's samples of a full window where ranks are unequal. They decide who
        computes a sample, never which samples the window has.
        """
        shares = (
            batch.rank_shares(len(self.ids), world_size)
            if plan_shares is None
            else batch.window_shares(len(self.ids), plan_shares)
        )
        first = sum(shares[:rank])
        return first, self.ids[first : first + shares[rank]]


class Cut(NamedTuple):
    """How a full window is computed: the micro-batch, and every rank's samples (None: ranks are equal)."""

    micro_batch: int
    shares: Sequence[int] | None = None


@dataclass(frozen=True)
class WindowSchedule:
    """All windows of a run, by index."""

    samples: int
    effective_batch: int
    seed: int
    drop_last: bool = False
    """Leave out the short window at the end of each epoch; its samples have their turn in another epoch."""
    order: Order | None = None
    """None shuffles: `gatrain.train.order.permutation`."""
    data_samples: int | None = None
    """Samples of the data, where an epoch has another number of positions than that."""
    stages: BatchStages | None = None
    """Of an effective batch that changes; ``effective_batch`` is then the largest."""
    tokens: FirstAfterTokens | None = None
    """Where stages begin that are counted in tokens."""

    def __post_init__(self) -> None:
        if self.samples < self.effective_batch:
            raise DataError(
                f"the training data has {self.samples} samples, fewer than batch.effective="
                f"{self.effective_batch}: no window could be filled. "
                f"Use batch.effective={max(self.samples, 1)} or less, or more data."
            )

    @functools.cached_property
    def spans(self) -> list[Span]:
        """The windows of each stage, in order; one span where the effective batch never changes."""
        stages = self.stages or BatchStages((0,), (self.effective_batch,))
        return spans_of(stages, self.samples, self.drop_last, self.tokens)

    def stage_at(self, index: int) -> int:
        """Number of the stage, from 0, that window ``index`` is of."""
        return span_at(self.spans, index)

    def effective_at(self, index: int) -> int:
        """The effective batch of window ``index``: samples, where nothing else is counted."""
        return self.spans[self.stage_at(index)].effective_batch

    def full_at(self, index: int) -> int:
        """Samples of window ``index`` where it is not cut short by the end of an epoch."""
        return self.effective_at(index)

    @property
    def stage_starts(self) -> tuple[tuple[int, int], ...]:
        """(index of its first window, effective batch) of each stage; empty where there is one."""
        return () if self.stages is None else tuple((s.index, s.effective_batch) for s in self.spans)

    @property
    def fingerprint(self) -> str:
        """Differs where windows do, beside their samples, order and one effective batch."""
        return ",".join(f"{index}:{size}" for index, size in self.stage_starts)

    @property
    def per_epoch(self) -> int:
        """Windows of one epoch; the last may be short, unless that is left out. Of the largest, where the effective
        batch changes."""
        if self.drop_last:
            return self.samples // self.effective_batch
        return -(-self.samples // self.effective_batch)

    def window(self, index: int) -> Window:
        """The window of optimizer step ``index`` (from 0)."""
        place = self.spans[self.stage_at(index)].place(index)
        draws = getattr(self.order, "draws", None)
        if draws is not None:
            draws = draws(place.epoch, np.arange(place.first, place.last, dtype=np.int64))
        return Window(index, place.epoch, self.ids(place.epoch, place.first, place.last), draws)

    def ids(self, epoch: int, first: int, last: int) -> Ids:
        """The samples at positions ``first`` to ``last`` - 1 of an epoch."""
        if self.order is None:
            return self._shuffled(epoch, first, last)
        positions = np.arange(first, last, dtype=np.int64)
        total = self.samples if self.data_samples is None else self.data_samples
        return checked_ids(self.order.ids(epoch, positions), positions, total, self.order)

    def _shuffled(self, epoch: int, first: int, last: int) -> Ids:
        """The permutation's ids of some positions. Of many at once it costs no more than of a few."""
        block = max(self.effective_batch, _BLOCK // self.effective_batch * self.effective_batch)
        parts = []
        while first < last:
            nth, place = divmod(first, block)
            parts.append(
                _block(self.samples, self.seed, epoch, nth * block, block)[place : place + last - first]
            )
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)  # several where stages differ

    def steps(self, steps: int | None, epochs: float | None) -> int:
        """Number of windows to train: ``steps``, or as many as cover ``epochs``."""
        if steps is not None:
            return steps
        if self.stages is not None:
            for span, following in zip(self.spans, [*self.spans[1:], None], strict=True):
                end = span.first_after_epochs(epochs or 0.0)
                if following is None or end <= following.index:
                    return end
        whole, part = divmod(epochs or 0.0, 1.0)
        return int(whole) * self.per_epoch + math.ceil(part * self.per_epoch)


def windows(
    samples: int,
    effective_batch: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    drop_last: bool = False,
    order: Order | None = None,
) -> Iterator[list[int]]:
    """Yield, without end, the sample ids of this rank for window ``start``, ``start`` + 1, ...

    The library form for people who keep their own loop: every world size sees the same windows. ``drop_last``
    leaves out the short window at the end of each epoch. ``order`` is any object with ``ids(epoch, positions)``,
    such as `gatrain.train.order.sequential.Sequential`; None shuffles.

    Raises:
        DataError: fewer samples than ``effective_batch``.
    """
    schedule = WindowSchedule(samples, effective_batch, seed, drop_last, order)
    index = start
    while True:
        yield schedule.window(index).slice_of(rank, world_size)[1].tolist()
        index += 1
