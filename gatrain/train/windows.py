"""Windows: which samples make up optimizer step ``n``, for any world size.

A window depends on (number of samples, seed, effective batch, n) alone. The order of an epoch is a keyed
permutation that is computed by index, so that a billion samples cost neither memory nor start-up time: a
Feistel network over the next even power of two, walked until it lands inside the range (cycle walking;
Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), with the SplitMix64 finaliser
(Steele, Lea and Flood, OOPSLA 2014) as the round function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gatrain import batch
from gatrain.errors import DataError
from gatrain.train.seeding import derive_seed, mix64

Ids = npt.NDArray[np.int64]
_ROUNDS = 8
MOST_EXACT_PAIRS = 2**20
"""Samples whose `digest` is the same whichever ranks' parts are added as float64."""


def permutation(samples: int, seed: int, epoch: int, positions: Ids) -> Ids:
    """Sample ids at ``positions`` of the epoch's order.

    Args:
        samples: size of the training data, at least 1.
        seed: run seed.
        epoch: pass over the data; every epoch has an order of its own.
        positions: int64, shape [n], each in [0, samples).

    Returns:
        int64, shape [n]: over all positions each id appears exactly once.
    """
    half_bits = max(1, math.ceil(math.log2(max(samples, 2)) / 2))
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(derive_seed(seed, epoch, round_)) for round_ in range(_ROUNDS)]

    def encrypt(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = words >> half, words & mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & mask)
        return (left << half) | right

    result = encrypt(positions.astype(np.uint64))
    outside = result >= samples
    while outside.any():  # at most 4x the range, so a few rounds on average
        result[outside] = encrypt(result[outside])
        outside = result >= samples
    return result.astype(np.int64)


def digest(first_position: int, ids: Ids) -> int:
    """Order-dependent fingerprint of part of a window; parts of several ranks add up to the whole's.

    Each (position, id) pair gives 32 bits, so sums of up to `MOST_EXACT_PAIRS` stay exact in float64.
    """
    positions = np.arange(first_position, first_position + len(ids), dtype=np.uint64)
    words = mix64(mix64(ids.astype(np.uint64)) + positions * np.uint64(0x9E3779B97F4A7C15))
    return int((words >> np.uint64(32)).sum())


@dataclass(frozen=True)
class Window:
    """One optimizer step's samples: ``ids`` of all ranks in order. Short only at the end of an epoch."""

    index: int
    epoch: int
    ids: Ids

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


@dataclass(frozen=True)
class WindowSchedule:
    """All windows of a run, by index."""

    samples: int
    effective_batch: int
    seed: int
    drop_last: bool = False
    """Leave out the short window at the end of each epoch; its samples have their turn in another epoch."""

    def __post_init__(self) -> None:
        if self.samples < self.effective_batch:
            raise DataError(
                f"the training data has {self.samples} samples, fewer than batch.effective="
                f"{self.effective_batch}: no window could be filled. "
                f"Use batch.effective={max(self.samples, 1)} or less, or more data."
            )

    @property
    def per_epoch(self) -> int:
        """Windows of one epoch; the last may be short, unless that is left out."""
        if self.drop_last:
            return self.samples // self.effective_batch
        return -(-self.samples // self.effective_batch)

    def window(self, index: int) -> Window:
        """The window of optimizer step ``index`` (from 0)."""
        epoch, nth = divmod(index, self.per_epoch)
        first = nth * self.effective_batch
        positions = np.arange(first, min(first + self.effective_batch, self.samples), dtype=np.int64)
        return Window(index, epoch, permutation(self.samples, self.seed, epoch, positions))

    def steps(self, steps: int | None, epochs: float | None) -> int:
        """Number of windows to train: ``steps``, or as many as cover ``epochs``."""
        if steps is not None:
            return steps
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
) -> Iterator[list[int]]:
    """Yield, without end, the sample ids of this rank for window ``start``, ``start`` + 1, ...

    The library form for people who keep their own loop: every world size sees the same windows. ``drop_last``
    leaves out the short window at the end of each epoch.

    Raises:
        DataError: fewer samples than ``effective_batch``.
    """
    schedule = WindowSchedule(samples, effective_batch, seed, drop_last)
    index = start
    while True:
        yield schedule.window(index).slice_of(rank, world_size)[1].tolist()
        index += 1
