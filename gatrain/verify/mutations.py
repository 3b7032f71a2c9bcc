"""The usual mistakes, planted on purpose: a check that nothing can fail proves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from gatrain.train.gradient.exact_norm import ExactNorm
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.norm.over_window import WindowNorms
from gatrain.train.step import Step


class MeanOfMeans(Plain):
    """Each micro-batch's own mean, divided by the number of micro-steps."""

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        for k, batch in step.batches(window):
            weights = window.micro_batches[k].weights
            count = len(window.micro_batches)
            # a micro-batch without weight (ignored targets alone) has no mean
            step.forward_backward(
                batch, {name: 1 / weight / count if weight else 0.0 for name, weight in weights.items()}
            )


class RanksAveraged(Plain):
    """Gradients averaged over the ranks where their sum is wanted."""

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        step.scale = {name: factor / step.ranks.world_size for name, factor in step.scale.items()}
        super().__call__(window, step)


class _NothingThroughStatistics(WindowNorms):
    def summed(self, nth: int, own: Tensor | None) -> Tensor:
        return torch.zeros_like(super().summed(nth, own))


class ConstantStatistics(ExactNorm):
    """BatchNorm's statistics over the window as constants, with no gradient through them."""

    norms = _NothingThroughStatistics


class SixteenBitSums(Plain):
    """Gradients of 16-bit parameters added up in 16 bits: whoever uses it makes no main gradients."""
