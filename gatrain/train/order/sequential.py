"""``order: sequential``: the data's own order, the same in each epoch; for curricula and data sorted beforehand."""

from __future__ import annotations

from gatrain.train.order import Ids


class Sequential:
    """Position ``i`` is sample ``i``."""

    def ids(self, epoch: int, positions: Ids) -> Ids:
        return positions
