"""How many tokens each sample has, known before anything is read, and where in a run so many have been given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gatrain.errors import ConfigError
from gatrain.tasks.base import Task
from gatrain.train import samples
from gatrain.train.order import Ids
from gatrain.train.order.values import values_of
from gatrain.train.stage_spans import Span

Lengths = npt.NDArray[np.int64]
IdsOf = Callable[[int, int, int], Ids]
"""The sample ids at positions ``first`` to ``last`` - 1 of an epoch."""


def token_lengths(task: Task, seed: int, key: str) -> int | Lengths:
    """Tokens of every sample: one number where they are declared equally long, else an attribute ``lengths``.

    Args:
        key: the setting that asks, for messages.

    Raises:
        ConfigError: nothing but reading all of the data would tell them.
    """
    data = task.train_data
    if _has_lengths(data):
        found = values_of(data, "lengths", key)
        if not (found == np.floor(found)).all():
            raise ConfigError(f"{key}: the training data's lengths are not whole numbers.")
        return found.astype(np.int64)
    if task.variable_length is False:
        sample = samples.read_one(task, data, (0, 0), seed)
        tokens = task.tokens(samples.make(task, [sample], [(0, 0)], seed).batch)
        if tokens:
            return int(tokens)
    raise ConfigError(
        f"{key} needs the tokens of every sample before it is read, and the training data "
        f"({type(data).__name__}) does not tell them. Let it have an attribute lengths (a number for each sample), "
        "or count in samples."
    )


def _has_lengths(data: Any) -> bool:
    while data is not None:
        if getattr(data, "lengths", None) is not None:
            return True
        data = getattr(data, "dataset", None)
    return False


class TokenPlaces:
    """Finds windows by the tokens given before them: a `gatrain.train.stage_spans.FirstAfterTokens`.

    Args:
        lengths: tokens of each sample, or of every one.
        ids: the order.
        each_once: every epoch has each sample once, so the sum of a whole one is known without a look.
    """

    def __init__(self, lengths: int | Lengths, ids: IdsOf, each_once: bool) -> None:
        self._lengths, self._ids, self._each_once = lengths, ids, each_once
        self._before = {0: 0}
        """Tokens before the window with which a stage begins, by its index."""

    def __call__(self, span: Span, tokens: int) -> int:
        if isinstance(self._lengths, int):
            return span.first_after_samples(-(-tokens // self._lengths))
        given, index = self._before[span.index], span.index
        epoch, position, windows = span.epoch, span.position, span.in_first
        while True:
            edges = np.minimum(position + span.effective_batch * np.arange(windows + 1), span.samples)
            sums = given + self._sums(epoch, position, edges)
            nth = int(np.searchsorted(sums, tokens))
            if nth <= windows:
                self._before[index + nth] = int(sums[nth])
                return index + nth
            given, index = int(sums[-1]), index + windows
            epoch, position, windows = epoch + 1, 0, span.per_epoch
            if self._each_once and not span.drop_last:  # epochs that need no look
                total = int(self._lengths.sum())
                skipped = max(0, (tokens - given - 1) // total)
                given, index, epoch = given + skipped * total, index + skipped * windows, epoch + skipped

    def _sums(self, epoch: int, position: int, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens from ``position`` to each of the edges, the first of which it is."""
        assert not isinstance(self._lengths, int)
        if edges[-1] == position:  # an epoch's rest that is left out
            return np.zeros(len(edges), dtype=np.int64)
        found = self._lengths[self._ids(epoch, position, int(edges[-1]))]
        sums = np.concatenate([[0], np.cumsum(found)])
        return sums[edges - position]
