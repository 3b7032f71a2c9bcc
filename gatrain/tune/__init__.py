"""The tuner: the fastest exact split of one effective batch on the hardware at hand, by measurement.

    config + hardware -> settings (what is asked) -> estimate (what cannot fit) -> planner
    planner -> cache (what is known) or rounds (what is measured) -> search (the model's choice)
            -> confirm (whole steps decide close calls) -> answer, advice -> Plan, or refusal
    ====== process boundary: folders with trial_spec.json and config.yaml; trials.jsonl comes back ======
    host (imports once, forks) -> trial -> measure (one size), memory, memory_model, whole (whole steps, in turn)

Importing this package imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatrain.batch import Split
from gatrain.config import RunConfig
from gatrain.errors import GatrainError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
from gatrain.launch.world import Nodes
from gatrain.plan import MadeFor, Plan
from gatrain.tune import cache, knobs
from gatrain.tune.estimate import check_state_fits, state_bytes
from gatrain.tune.planner import Planner
from gatrain.tune.processes import TrialHost

__all__ = [
    "make_plan_for",
    "needs_trials",
    "remembered",
    "remembered_plan",
    "state_bytes",
    "trial_host",
]


def make_plan_for(
    config: RunConfig,
    data_info: Inspected,
    hardware: Hardware,
    nodes: Nodes,
    *,
    progress: Callable[[str], None] = lambda text: None,
    retune: bool = False,
    cwd: Path | None = None,
    run: Callable[[Path], None] | None = None,
    config_yaml: str | None = None,
) -> Plan:
    """Find the split of ``config.batch.effective`` over ``nodes`` with the fastest optimizer step.

    Values that the config fixes are taken as they are; with nothing left to decide no process is started.
    Call it from the main thread: trial processes are stopped by Ctrl-C.

    Args:
        config: of the run.
        data_info: what an inspection found model and data to be.
        hardware: of this machine; every node is taken to be like it.
        nodes: the world that will train; trials run on this node's part of it.
        progress: told one sentence at a time, also from another thread.
        retune: measure again, whatever the cache holds.
        cwd: folder of the user's own modules and data; None is the current one.
        run: lets trial processes answer, such as a `TrialHost`; None starts one and ends it.
        config_yaml: what the trial processes read, with its references unresolved, so that no secret is written
            for them; None writes ``config``.

    Raises:
        PlanError: a fixed micro-batch exceeds a rank's share.
        DoesNotFitError: the model does not fit in memory, even at one sample.
        WorkerError: the user's code failed at every size.
        GatrainError: what went wrong while the model or its data were built.
        Interrupted, KeyboardInterrupt: a person stopped it; what was measured is kept in the cache.
    """
    half = data_info.half_dtypes
    space = knobs.search_space(config, hardware)
    notes = [knobs.half_note(data_info.half_parameters, half, data_info.parameters)] if half else []
    notes += data_info.remarks
    fixed = space.fixed_micro_batch
    split = Split(config.batch.effective, nodes.world_size)
    if fixed is not None:
        split.check_micro_batch(fixed)
    check_state_fits(config, data_info, hardware, nodes.nproc)
    if fixed is not None and not space.needs_trials:
        plan = Plan(
            split=split,
            micro_batch=fixed,
            settings=space.base,
            reason=f"batch.micro={fixed} was asked for; {space.precision_reason}",
        )
    else:
        planner = Planner(
            config,
            data_info,
            hardware,
            nodes,
            space,
            progress=progress,
            retune=retune,
            cwd=cwd,
            run=run,
            config_yaml=config_yaml,
        )
        plan = planner.plan()
    if (note := knobs.norm_note(data_info.batch_norms, plan, data_info.synchronises)) is not None:
        notes.append(note)
    made_for = MadeFor(data_info.parameters, data_info.samples, data_info.eval_samples)
    return dataclasses.replace(plan, notes=[*notes, *plan.notes], made_for=made_for)


def needs_trials(config: RunConfig, hardware: Hardware) -> bool:
    """Whether anything is left for trials to decide, if nothing is remembered."""
    return knobs.search_space(config, hardware).needs_trials


def trial_host(
    config: RunConfig, hardware: Hardware, nodes: Nodes, cwd: Path | None = None, **options: Any
) -> TrialHost:
    """Trial processes for these spaces, not started yet: `TrialHost.start` lets their imports begin early.

    Args:
        options: ``shared`` and ``announce`` of `TrialHost`, for several nodes.
    """
    compiles = knobs.search_space(config, hardware).may_compile
    return TrialHost(nodes, hardware.device, cwd, compiles=compiles, **options)


def remembered_plan(
    config: RunConfig, data_info: Inspected, hardware: Hardware, nodes: Nodes, *, cwd: Path | None = None
) -> Plan | None:
    """The plan that `make_plan_for` would give without measuring; None if it would have to measure."""

    class NotRemembered(Exception):
        pass

    def refuse(folder: Path) -> None:
        raise NotRemembered

    try:
        return make_plan_for(config, data_info, hardware, nodes, cwd=cwd, run=refuse)
    except NotRemembered:
        return None


def remembered(
    config: RunConfig, hardware: Hardware, nodes: Nodes, *, cwd: Path | None = None
) -> tuple[Plan, Inspected] | None:
    """A plan that nothing has to be measured for, and the model and data that it is for, as they were when it was
    measured. None where nothing is known, where a file that they are known to depend on has changed, or where what
    is known would refuse the run: then they are looked at again, and whatever is said is of today."""
    known = cache.load_inspected(cache.fingerprint(config, hardware, nodes.world_size, cwd))
    if known is None or known.samples < config.batch.effective:
        return None
    try:
        plan = remembered_plan(config, known, hardware, nodes, cwd=cwd)
    except GatrainError:
        return None
    if plan is None or plan.made_for is None:
        return None
    return dataclasses.replace(plan, made_for=dataclasses.replace(plan.made_for, is_remembered=True)), known
