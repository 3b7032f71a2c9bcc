"""The split of every stage where the effective batch changes over a run: pure functions, no torch.

The largest stage is planned as any effective batch is, full steps included, since it needs most memory and most of
the time. Precision, checkpointing, compilation and the reduction are the same for the whole run. What was measured
says for every effective batch how long a step takes, so each further stage gets the micro-batch fastest for it.
"""

from __future__ import annotations

import dataclasses

from gatrain.batch import Split
from gatrain.batch_stages import BatchStages
from gatrain.plan import Plan, Stage
from gatrain.tune import search
from gatrain.tune.curve import Curve


def with_stages(
    plan: Plan,
    stages: BatchStages,
    *,
    curve: Curve | None = None,
    fixed: int | None = None,
    equal_steps: bool = False,
) -> Plan:
    """The plan of the largest stage with those of all stages; as it is where there is one.

    Args:
        curve: the one behind the plan; None where nothing was measured.
        fixed: ``batch.micro``, where it is a number.
        equal_steps: every rank must have as many micro-steps (SyncBatchNorm).
    """
    if stages.is_constant:
        return plan
    found = []
    for number, effective in enumerate(stages.sizes):
        split, micro_batch = plan.split, plan.micro_batch
        if effective != plan.effective_batch:
            split, micro_batch = _of(Split(effective, plan.world_size), plan, curve, fixed, equal_steps)
        found.append(Stage("" if number == 0 else stages.begins(number), split, micro_batch))
    return dataclasses.replace(plan, stages=found)


def _of(
    even: Split, plan: Plan, curve: Curve | None, fixed: int | None, equal_steps: bool
) -> tuple[Split, int]:
    if curve is not None and fixed is None:
        options = [  # sizes between two that were measured are smaller than one that fits
            dataclasses.replace(option, measured=True)
            for option in search.candidates(curve, even)
            if not equal_steps or option.split.has_equal_steps(option.micro_batch)
        ]
        if options:
            chosen = search.choose(options)
            return chosen.split, chosen.micro_batch
    # smaller than what fits
    split = even if plan.split.is_even else even.in_proportion(plan.split.shares)
    return split, min(plan.micro_batch, split.share)
