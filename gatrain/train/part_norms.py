"""Squared norms of parts of a window's gradient, before they are added up: what a noise scale is measured from.

The parts are, for all ranks: each rank's share before the reduction (``sync=window``), or each rank's first
micro-batch where it has several (one rank, or ``sync=overlap``). One norm a window and rank, and nothing else: no
copy of a gradient, no collective, no wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.train.gradient import GradientStrategy
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.optimizer import dense_parts
from gatrain.train.parallel import Replicated
from gatrain.train.precision import LossScaler

COUNTS = "part_weight", "parts", "uneven_parts"
"""What goes with `LoadedWindow.counts`: the parts' weights and number, and ranks where loss terms disagree."""


class PartNorm(NamedTuple):
    """This rank's part of a window."""

    norm: Tensor
    """L2 norm of this part's share of the gradient, divided by T as the whole: a scalar on the device."""
    weight: float
    """Of the samples in it."""


class PartNorms:
    """Takes the norm of this rank's part of each window, if somebody `want`\\ s it.

    Args:
        scaler: its loss scale is taken out, as every window may have another.
    """

    def __init__(self, parallel: Replicated, scaler: Any = None) -> None:
        self._parallel = parallel
        self._scaler = scaler if isinstance(scaler, LossScaler) else None
        self.wanted = False
        self._left: int | None = None
        """Micro-steps until the norm is taken; None: it is not, or was."""
        self._weight = 0.0
        self._found: PartNorm | None = None

    def want(self, strategy: GradientStrategy) -> None:
        """Measure from the next window on.

        Raises:
            ConfigError: ``.grad`` is no sum over micro-batches in the middle of a window.
        """
        check_measurable(strategy)
        self.wanted = True

    def begin(self, window: LoadedWindow) -> None:
        """Before the weights are counted: choose the part, and let its weight travel with the counts."""
        self._left, self._found = None, None
        if not self.wanted:
            return
        weights = [_one_weight(micro.weights) for micro in window.micro_batches]
        is_uneven = None in weights
        known = [weight or 0.0 for weight in weights]
        self._left, self._weight = (None, 0.0) if is_uneven else self._part(known)
        window.counts.update(
            zip(COUNTS, (self._weight, float(self._left is not None), float(is_uneven)), strict=True)
        )

    def after_micro_step(self) -> None:
        """A micro-batch's backward has been started."""
        if self._left is None or self._left == 0:
            return
        self._left -= 1
        if self._left == 0:
            self._take()

    def before_reduction(self) -> None:
        """All of this rank's micro-batches are in ``.grad``."""
        if self._left is not None and self._left < 0:
            self._take()

    def found(self) -> PartNorm | None:
        """Of the window that has ended; None where this rank has no part that can be compared."""
        return self._found

    def _part(self, weights: list[float]) -> tuple[int | None, float]:
        """Micro-steps after which to measure (below 0: all, before the reduction), and the weight by then."""
        if self._parallel.ranks.world_size > 1 and not self._parallel.overlaps:
            total = sum(weights)
            return (-1, total) if total else (None, 0.0)
        so_far = 0.0
        for nth, weight in enumerate(weights[:-1], 1):  # with the last one it would be the whole
            so_far += weight
            if so_far:
                return nth, so_far
        return None, 0.0

    def _take(self) -> None:
        self._left = None
        gradients = [p.grad for p in self._parallel.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(dense_parts(gradients))
        if self._scaler is not None:
            norm = norm / self._scaler.now()
        self._found = PartNorm(norm, self._weight)


def check_measurable(strategy: GradientStrategy) -> None:
    """
    Raises:
        ConfigError: this way from a window to its gradient has no parts that could be compared.
    """
    if not strategy.adds_micro_batches:
        raise ConfigError(
            "noise_scale compares the gradient of a part of the window with that of all of it, and "
            f"{type(strategy).__name__}, by which this recipe computes it, has no such parts in .grad. Leave "
            "noise_scale out of hooks, or use gradient=plain, norm=keep and another optimizer than adama."
        )


def window_parts(
    counts: Mapping[str, float], totals: Mapping[str, float], squared: float
) -> dict[str, float]:
    """`StepRecord.parts` of a window; empty where nothing was measured on any rank.

    Args:
        counts: of the window, over all ranks.
        totals: T of each loss term.
        squared: sum over the parts of weight * |mean gradient of the part|**2, over all ranks.
    """
    total = next((total for total in totals.values() if total), 0.0)
    if not counts.get("parts") or counts["uneven_parts"] or not total:
        return {}
    return {
        "count": counts["parts"],
        "weight": counts["part_weight"],
        "total": total,
        "samples": counts["samples"],
        "squared": squared,
    }


def _one_weight(weights: Mapping[str, float]) -> float | None:
    """The weight of a micro-batch; None where its loss terms have different ones, so that no size is theirs all."""
    found = set(weights.values()) or {0.0}
    return float(found.pop()) if len(found) == 1 else None
