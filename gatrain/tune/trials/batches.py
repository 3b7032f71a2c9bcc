"""The batches that trials compute: of any size, made from few samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from gatrain.tasks.base import Batch, Task
from gatrain.train import samples

DISTINCT_SAMPLES = 64
"""Worst-case samples that are really read; a larger batch repeats them."""


class TrialBatches:
    """Host batches of any size from few samples: the largest for time and memory, one repeated for truth."""

    def __init__(self, task: Task, seed: int = 0) -> None:
        self.task = task
        self._seed = seed
        self._samples: dict[samples.Key, Any] = {}

    def worst_case(self, size: int) -> tuple[Batch, Mapping[str, float]]:
        """``size`` samples that need the most memory, with their weights."""
        indices = list(self.task.worst_case_indices(min(size, DISTINCT_SAMPLES)))
        return self._batch([indices[i % len(indices)] for i in range(size)])

    @property
    def vary(self) -> bool:
        """Whether batches of one size differ in shape, so that usual ones take other times than the worst."""
        return bool(self.task.variable_length)

    def usual(self, size: int, count: int) -> list[tuple[Batch, Mapping[str, float]]]:
        """``count`` batches of random samples, the same for every rank and way of computing; empty where every
        batch of a size is like the worst."""
        if not self.vary:
            return []
        drawn = self.drawn(size * count)
        return [self._batch(drawn[nth * size : (nth + 1) * size]) for nth in range(count)]

    def drawn(self, count: int) -> list[int]:
        """Indices of random samples, in a fixed order."""
        total = len(self.task.train_data)
        order = random.Random(0)
        found: list[int] = []
        while len(found) < count:
            found += order.sample(range(total), min(total, count - len(found)))
        return found

    def window(
        self, shares: Sequence[int], rank: int, sizes: Sequence[int]
    ) -> list[tuple[Batch, Mapping[str, float]]]:
        """One rank's micro-batches of a window: random samples where they vary, else the worst."""
        if not self.vary:
            made = {size: self.worst_case(size) for size in dict.fromkeys(sizes)}
            return [made[size] for size in sizes]
        mine = self.drawn(sum(shares))[sum(shares[:rank]) :]
        ends = list(itertools.accumulate(sizes))
        return [self._batch(mine[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    def repeated(self, size: int) -> tuple[Batch, Mapping[str, float]]:
        """The worst-case sample ``size`` times, with the weights."""
        return self._batch([next(iter(self.task.worst_case_indices(1)))] * size)

    def _batch(self, indices: Sequence[int]) -> tuple[Batch, Mapping[str, float]]:
        keys = [(0, int(index)) for index in indices]
        micro = samples.make(self.task, [self._read(key) for key in keys], keys, self._seed)
        return micro.batch, micro.weights

    def _read(self, key: samples.Key) -> Any:
        if key not in self._samples:
            self._samples[key] = samples.read_one(self.task, self.task.train_data, key, self._seed)
        return self._samples[key]
