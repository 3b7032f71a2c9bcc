"""Plain accumulation: one backward for each micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatrain.train.gradient import GradientStrategy
from gatrain.train.micro_batches import LoadedWindow

if TYPE_CHECKING:
    from gatrain.train.step import Step


class Plain(GradientStrategy):
    """A forward and a backward for each micro-batch, whose gradients add up in ``.grad``."""

    exact = "the gradient of the whole window, for any loss that is a sum over samples"
    overlaps = True
    adds_micro_batches = True

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        last = len(window.micro_batches) - 1
        for k, batch in step.batches(window):  # on the device; k + 1 is copied there while k computes
            step.seed(window, k)
            step.forward_backward(batch, last=k == last)
            del batch  # before the next but one is copied
