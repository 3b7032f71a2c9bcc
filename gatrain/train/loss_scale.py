"""fp16: a window whose gradient overflows is computed again at a lower loss scale, so that none is lost to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from gatrain.errors import PeerFailed
from gatrain.train.gradient import Update
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.precision import LOWEST_SCALE, LossScaler
from gatrain.train.rehearsal import rehearse
from gatrain.train.window_result import WindowResult

if TYPE_CHECKING:
    from gatrain.train.step import Step

TRIES = 3
"""Times that a window is computed again; each has a scale found fit before."""
BLIND_TRIES = 12
"""Times, where no micro-batch by itself tells what fits: the scale is halved for each. From PyTorch's first scale,
2^16, to 2^4."""


def try_lower_scales(
    step: Step, window: LoadedWindow, result: WindowResult, update: Update
) -> tuple[WindowResult, Update]:
    """Compute a window again whose gradient was not finite; gives the last try's outcome. Collective; rare.

    The loss scale is as before where that did not help: then it was not the scale.
    """
    assert isinstance(step.scaler, LossScaler)
    before = step.scaler.state_dict()
    alone = step.strategy.needs_sum_over_samples
    for _ in range(TRIES if alone else BLIND_TRIES):
        if not (_lower_scale if alone else _halve)(step, step.scaler, window, result):
            break
        result, update = step.attempt(window)
        if update.made:
            return result, update
    step.scaler.load_state_dict(before)
    return result, update


def _lower_scale(step: Step, scaler: LossScaler, window: LoadedWindow, result: WindowResult) -> bool:
    """Find a loss scale at which no micro-batch of the window overflows. Collective.

    Micro-batch by micro-batch, so that a scale far too high costs some micro-steps and not some windows.

    Returns:
        Whether the window is worth another try.
    """
    before = scale = scaler.get_scale()
    if not math.isfinite(result.loss()):
        return False  # the forward knows no loss scale
    factor = {name: 1 / total if total else 0.0 for name, total in result.weight_totals.items()}
    index, more = 0, True
    while more:
        micro = window.micro_batches[index] if index < len(window.micro_batches) else None
        finite, failure = True, None
        try:
            if micro is not None:
                finite = rehearse(step, micro.batch, factor, partial(step.seed, window, index)).is_finite
        except Exception as error:
            failure = error
        more_here = index + 1 < len(window.micro_batches)
        failed, overflowed, more_anywhere = step.ranks.sum([failure is not None, not finite, more_here])
        if failure is not None:
            raise failure
        if failed:
            raise PeerFailed("another rank failed in this window; its own error says why.")
        if not overflowed:
            index, more = index + 1, more_anywhere > 0
            continue
        scale /= 2
        if scale < LOWEST_SCALE:
            return False
        scaler.set_to(scale)
    if scale == before:  # only the sum overflowed
        scaler.set_to(scale / 2)
    return True


def _halve(step: Step, scaler: LossScaler, window: LoadedWindow, result: WindowResult) -> bool:
    """As `_lower_scale`, for a loss of all samples together: no micro-batch says anything by itself."""
    scale = scaler.get_scale() / 2
    if not math.isfinite(result.loss()) or scale < LOWEST_SCALE:
        return False
    scaler.set_to(scale)
    return True


@contextlib.contextmanager
def lowest_loss_scale(scaler: LossScaler | None) -> Iterator[None]:
    """In here nothing overflows in fp16 because of the loss scale."""
    before = scaler.state_dict() if scaler else {}
    try:
        if scaler:
            scaler.set_to(LOWEST_SCALE)
        yield
    finally:
        if scaler:
            scaler.load_state_dict(before)
