"""Before the first step: does the loss of a batch equal the losses of its pieces, added up?

Accumulation is exact for a loss that is a sum over samples with a weight that is one, too. Nobody can read that off
a user's code, but a few samples show it: computed whole and in two unequal pieces, with random numbers switched
off, in fp32 where the model allows it, since rounding would hide small faults. What differs is named before
anything is trained. Each rank computes alone; then all share one verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from gatrain.config import RunConfig
from gatrain.errors import ExactnessError, GatrainError, PeerFailed
from gatrain.tasks.base import Batch
from gatrain.train.check.comparison import Comparison, LossCheck
from gatrain.train.engine import Engine
from gatrain.train.windows import WindowSchedule

OFF = "train.check=warn goes on all the same, train.check=off leaves this check out."


def check_loss(
    engine: Engine,
    ids: Sequence[int],
    *,
    epoch: int = 0,
    seed: int = 0,
    mode: str = "error",
    micro_batch: int | None = None,
    lenient: bool = False,
    of_rows: Callable[[Batch], Tensor] | None = None,
) -> list[str]:
    """Compare a few samples computed whole and in pieces. Collective.

    Model, task and random generators are left as they were.

    Args:
        engine: the model on this rank's device.
        ids: training samples to choose from, such as this rank's of the first window.
        epoch: of these samples; with ``seed`` it decides their augmentation.
        mode: ``error``, ``warn`` or ``off``.
        micro_batch: of the plan, if there is one; not many more samples are computed at once.
        lenient: an error of the user's model is no verdict: for trials, where sizes may fail.
        of_rows: what must be a sum over samples instead of the loss (`GradientStrategy.sum_to_check`).

    Returns:
        What to tell: the fault under ``warn``, and what could not be checked.

    Raises:
        ExactnessError: with ``error``, a loss that would be trained wrongly; says what to write.
        PeerFailed: another rank found it.
        Exception: the user's own error in data, model or loss.
    """
    if mode == "off":
        return []
    found = LossCheck()
    error: Exception | None = None
    try:
        found = Comparison(engine, ids, epoch, seed, micro_batch, of_rows, has_gradients=not lenient).run()
    except GatrainError as caught:
        error = caught
    except Exception as caught:
        error = None if lenient else caught
    every = engine.ranks.gather((found, error is not None))
    if error is not None:
        raise error
    if any(failed for _, failed in every):
        raise PeerFailed("another rank failed in the check of the loss; its own error says why.")
    notices = list(dict.fromkeys(notice for each, _ in every for notice in each.notices))
    fault = next((each.fault for each, _ in every if each.fault is not None), None)
    if fault is not None and mode == "error":
        if found.fault is None:
            raise PeerFailed("another rank found the loss wrong; its own error says why.")
        raise ExactnessError(f"{found.fault} Nothing was trained. {OFF}")
    return [f"Wrong result ahead: {fault}", *notices] if fault is not None else notices


def check_before_first_step(
    engine: Engine,
    config: RunConfig,
    schedule: WindowSchedule,
    step: int,
    micro_batch: int | None,
    *,
    lenient: bool = False,
) -> list[str]:
    """`check_loss` on samples of window ``step``, those of this rank first. Collective."""
    strategy, of_rows = engine.step.strategy, None
    if not strategy.needs_sum_over_samples:  # a loss of all samples together is what the strategy is for
        of_rows = strategy.sum_to_check(engine.step)
        if of_rows is None:
            return []
    window = schedule.window(step)
    first, _ = window.slice_of(engine.ranks.rank, engine.ranks.world_size)
    return check_loss(
        engine,
        np.roll(window.ids, -first).tolist(),
        epoch=window.epoch,
        seed=config.train.seed,
        mode=config.train.check,
        micro_batch=micro_batch,
        lenient=lenient,
        of_rows=of_rows,
    )
