"""The usual mistakes, planted on purpose: a check that nothing can fail proves nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gatrain.tasks.base import Batch, named_loss_sums
from gatrain.train.accumulate import PlainAccumulation, WindowResult
from gatrain.train.micro_batches import LoadedWindow


class MeanOfMeans(PlainAccumulation):
    """Each micro-batch's own mean, divided by the number of micro-steps."""

    def __call__(self, window: LoadedWindow) -> WindowResult:
        self._micro_steps = len(window.micro_batches)
        return super().__call__(window)

    def micro_step(
        self, batch: Batch, scale: Mapping[str, float], *, reduce_in_backward: bool = False
    ) -> None:
        exact = self._loss_sum

        def mean(on_device: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
            # the factor weight / T, which undoes the mean, is what is left out here
            return {
                name: (total / weight / self._micro_steps / scale[name], weight)
                for name, (total, weight) in named_loss_sums(exact(on_device)).items()
            }

        self._loss_sum = mean
        try:
            super().micro_step(batch, scale, reduce_in_backward=reduce_in_backward)
        finally:
            self._loss_sum = exact


class RanksAveraged(PlainAccumulation):
    """Gradients averaged over the ranks where their sum is wanted."""

    def micro_step(
        self, batch: Batch, scale: Mapping[str, float], *, reduce_in_backward: bool = False
    ) -> None:
        averaged = {name: factor / self._ranks.world_size for name, factor in scale.items()}
        super().micro_step(batch, averaged, reduce_in_backward=reduce_in_backward)


class SixteenBitSums(PlainAccumulation):
    """Gradients of 16-bit parameters added up in 16 bits: whoever makes it gives it no main gradients."""
