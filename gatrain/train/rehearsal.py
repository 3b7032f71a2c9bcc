"""A micro-batch computed on one rank alone, leaving nothing behind: to find out what it comes to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gatrain.tasks.base import Batch
from gatrain.train.optimizer import dense_parts
from gatrain.train.seeding import kept_random_state

if TYPE_CHECKING:
    from gatrain.train.step import Step


@dataclass(frozen=True)
class Rehearsal:
    """What one batch alone came to."""

    loss_sum: float
    norm: float
    """Of its gradient; in fp16 times the loss scale."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss_sum) and math.isfinite(self.norm)


def rehearse(
    step: Step,
    batch: Batch,
    scale: Mapping[str, float],
    seed: Callable[[], None] = lambda: None,
    *,
    fp32: bool = False,
) -> Rehearsal:
    """Forward and backward of one host batch: sums, gradients, buffers and random numbers are as before at the end.

    Not collective. Waits for the device.

    Args:
        batch: on the host.
        scale: as for `Step.forward_backward`.
        seed: sets the random numbers, such as `Step.seed` of this micro-batch.
        fp32: without autocast.
    """
    assert step.guard is not None
    step.guard.keep_buffers()
    sums, autocast = step.counts.aside(), step.autocast
    if fp32:
        step.autocast = step.random.around(contextlib.nullcontext)
    try:
        with kept_random_state():
            seed()
            step.forward_backward(step.stage(batch)(), scale)
            loss = float(step.counts.take()[0])
            gradients = dense_parts([p.grad for p in step.parallel.parameters if p.grad is not None])
            return Rehearsal(loss, float(nn.utils.get_total_norm(gradients)))
    finally:
        step.autocast = autocast
        step.counts.put_back(sums)
        step.parallel.drop_gradients()
        step.guard.restore_buffers()
