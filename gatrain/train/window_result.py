"""What a window came to, on one rank and over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gatrain.train.part_norms import PartNorm
from gatrain.train.ranks import Ranks


@dataclass
class WindowResult:
    """What a window came to."""

    weight_totals: dict[str, float]
    """T of each loss term, over all ranks, times the passes that were made over the window."""
    counts: dict[str, float]
    """`LoadedWindow.counts`, summed over all ranks."""
    local_loss_sums: dict[str, Tensor]
    """This rank's summed loss of each term: float64 scalars on the device, not yet added over the ranks."""
    ranks: Ranks = field(repr=False)
    device: torch.device = field(repr=False)
    skipped: bool = False
    """True if no update was made because the gradient is not finite, where that is known already."""
    part: PartNorm | None = None
    """Norm of this rank's part of the gradient, where a hook wants it (`PartNorms`)."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Further numbers of its update, by name (`gatrain.train.gradient.Update.metrics`)."""

    @property
    def is_empty(self) -> bool:
        """True if every weight of the window is zero: there is no gradient and no step to take."""
        return not any(self.weight_totals.values())

    def squared_part(self, norm: float) -> float:
        """weight * |mean gradient|**2 of this rank's part, given its `PartNorm.norm` as a number of the host."""
        assert self.part is not None
        total = next(
            total for total in self.weight_totals.values() if total
        )  # T, which the norm is divided by
        return (norm * total) ** 2 / self.part.weight

    def loss_is_bad(self) -> Tensor:
        """Whether the loss is not finite on any rank: a scalar on the device. Collective.

        Nothing waits for the device. An infinite loss may have a finite gradient, which does not tell of it.
        """
        losses = [total for name, total in self.local_loss_sums.items() if self.weight_totals[name]]
        if not losses:
            return self.ranks.any(torch.zeros((), dtype=torch.bool, device=self.device))
        finite = torch.isfinite(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
        return self.ranks.any(~finite)

    def loss(self) -> float:
        """Mean loss of the window over all ranks. Synchronises with the device; every rank must call it."""
        names = list(self.weight_totals)
        local = [float(self.local_loss_sums[name]) if name in self.local_loss_sums else 0.0 for name in names]
        sums = dict(zip(names, self.ranks.sum(local), strict=True))
        return sum(sums[name] / total for name, total in self.weight_totals.items() if total)
