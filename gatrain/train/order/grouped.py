"""``order: grouped``: samples of like length in one window, so that little is padded; windows in random order."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from gatrain.train.order import Ids
from gatrain.train.order.permutation import permutation
from gatrain.train.order.values import check_whole, values_of
from gatrain.train.seeding import derive_seed

_WINDOWS = 0x77696E64


class Grouped:
    """Each epoch is shuffled, cut into groups of ``windows`` windows, each group sorted by length and cut into
    windows again, and the windows of a group are put into random order.

    Every sample stands in an epoch once, as with ``shuffle``; the short window at the end has the samples that the
    shuffling puts there, of any length. How much randomness is given up for how little padding is said by
    ``windows``, as in Transformers' group_by_length.

    Args:
        lengths: one for each sample. See `gatrain.train.order.values`.
        windows: windows of a group.

    Raises:
        ConfigError: there is not one length for each sample.
    """

    def __init__(
        self, data: Any, seed: int, effective_batch: int, lengths: Any = "lengths", windows: int = 50
    ) -> None:
        check_whole("order.windows", windows, 10)
        self._lengths = values_of(data, lengths, "order.lengths")
        self._seed = seed
        self._window = effective_batch
        self._group = windows * effective_batch
        self._epoch: tuple[int, Ids] = (-1, np.empty(0, dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """Of the lengths: a run goes on with the same ones."""
        return f"{zlib.crc32(self._lengths.tobytes()):08x}"

    def ids(self, epoch: int, positions: Ids) -> Ids:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        found: Ids = self._epoch[1][positions]
        return found

    def _order(self, epoch: int) -> Ids:
        total = len(self._lengths)
        order = permutation(total, self._seed, epoch, np.arange(total, dtype=np.int64))
        full = total // self._window * self._window
        for first in range(0, full, self._group):
            group = order[first : min(first + self._group, full)]
            longest_first = group[np.argsort(-self._lengths[group], kind="stable")]
            windows = longest_first.reshape(-1, self._window)
            places = np.arange(len(windows), dtype=np.int64)
            shuffled = permutation(len(windows), derive_seed(self._seed, _WINDOWS, first), epoch, places)
            order[first : first + len(group)] = windows[shuffled].reshape(-1)
        return order
