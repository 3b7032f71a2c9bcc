"""``order: shuffle``: every sample once an epoch, each epoch in an order of its own."""

from __future__ import annotations

from collections.abc import Sized

from gatrain.train.order import Ids
from gatrain.train.order.permutation import permutation


class Shuffle:
    """A keyed permutation of each epoch (`gatrain.train.order.permutation`)."""

    def __init__(self, data: Sized, seed: int) -> None:
        self._samples = len(data)
        self._seed = seed

    def ids(self, epoch: int, positions: Ids) -> Ids:
        return permutation(self._samples, self._seed, epoch, positions)
