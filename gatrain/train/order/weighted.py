"""``order: {name: weighted, weights: ...}``: draws with replacement, each sample as often as its weight says."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from gatrain.errors import ConfigError
from gatrain.train.order import Ids
from gatrain.train.order.values import check_whole, values_of
from gatrain.train.seeding import derive_seed, mix64


class Weighted:
    """Draw ``p`` of epoch ``e`` follows from a hash of (seed, e, p): the same for any number of ranks.

    Args:
        weights: not below 0, one for each sample; they need not add up to 1. See `gatrain.train.order.values`.
        samples: draws of an epoch; as many as the data has samples by default.

    Raises:
        ConfigError: there is not one weight for each sample, or all are zero.
    """

    def __init__(self, data: Any, seed: int, weights: Any, samples: int | None = None) -> None:
        values = values_of(data, weights, "order.weights")
        if not values.any():
            raise ConfigError("order.weights are all zero: nothing would be drawn.")
        with np.errstate(over="ignore"):
            if not np.isfinite(values.sum()):  # else all draws would be of the last sample
                values = values / values.max()
        if samples is not None:
            check_whole("order.samples", samples, 1000)
        self.samples = len(values) if samples is None else samples
        self._ends = np.cumsum(values / values.sum())
        self._ends[-1] = 1.0
        self._last = int(np.flatnonzero(values)[-1])  # where rounding would draw what has weight zero
        self._seed = seed
        self._values = values

    @property
    def fingerprint(self) -> str:
        """Of the weights: a run goes on with the same ones."""
        return f"{zlib.crc32(self._values.tobytes()):08x}"

    @property
    def sentence(self) -> str:
        share = self._values / self._values.sum()
        unseen = float(np.mean((1 - share) ** self.samples))
        return (
            f"order=weighted: an epoch is {self.samples} draws with replacement, so that some samples come several "
            f"times in it and about {100 * unseen:.0f} % of the {len(share)} samples not at all."
        )

    def ids(self, epoch: int, positions: Ids) -> Ids:
        key = np.uint64(derive_seed(self._seed, epoch, 0x647261777321))
        words = mix64(mix64(positions.astype(np.uint64) + key) ^ key)
        uniform = (words >> np.uint64(11)).astype(np.float64) / 2.0**53  # in [0, 1)
        found = np.searchsorted(self._ends, uniform, side="right").astype(np.int64)
        return np.minimum(found, self._last)

    def draws(self, epoch: int, positions: Ids) -> Ids:
        """A sample that is drawn twice is augmented in two ways."""
        return epoch * self.samples + positions
