"""Optimizers and schedules of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from gatrain import targets
from gatrain.build.nodes import instantiate
from gatrain.build.windows import window_schedule
from gatrain.config import OptimizerConfig, RunConfig
from gatrain.errors import ConfigError
from gatrain.phase_config import phase_configs
from gatrain.signatures import believed_parameters
from gatrain.tasks.base import Task
from gatrain.train.engine import StepClock
from gatrain.train.modules import sparse_parameters
from gatrain.train.optimizer import Maker, check_takes_sparse
from gatrain.train.optimizer_state import check_step
from gatrain.train.phased_optimizer import counted_for, groupings
from gatrain.train.schedule import Factor, TorchFactor, check_factor, check_groups_alike, check_scheduler
from gatrain.train.seeding import kept_random_state
from gatrain.train.windows import WindowSchedule


def optimizer_maker(config: OptimizerConfig) -> Maker | None:
    """What makes the user's own optimizer over groups of parameters; None for a short name."""
    return None if config.node is None else _make_own_optimizer


def inspect_optimizer(config: RunConfig, task: Task, model: nn.Module) -> int:
    """Try the optimizer out and make the schedule, before anything is spent on a run.

    Args:
        model: with shapes; its values do not matter.

    Returns:
        Bytes of the tensors that the optimizer keeps for the trained parameters; 0 where that cannot be told.

    Raises:
        ConfigError: rules that match nothing, an optimizer or a schedule that cannot be used.
    """
    grouped = groupings(task, config.optimizer, model)
    for each, _ in grouped.values():
        check_takes_sparse(each, model)
    sizes = counted_for(grouped, sparse_parameters(model), optimizer_maker)
    if config.schedule.node is not None:
        windows = window_schedule(config, task)
        step_clock(config, windows.steps(config.train.steps, config.train.epochs), windows)
    return sum(sizes)


def step_clock(config: RunConfig, total_steps: int, windows: WindowSchedule | None = None) -> StepClock:
    """What the learning rate of each step follows from.

    Args:
        windows: of the run, where its effective batch has stages.

    Raises:
        ConfigError: a schedule of the user's own that is not a function of the step.
    """
    stages = () if windows is None else windows.stage_starts
    clock = StepClock(config.schedule, total_steps, config.batch.stages.first, stages=stages)
    if config.optimizer.phases is not None:
        own_ones = {
            name: dataclasses.replace(config, schedule=phase.schedule, optimizer=phase.optimizer)
            for name, phase in phase_configs(config.optimizer).items()
            if phase.schedule is not None
        }
        clock = dataclasses.replace(
            clock, phases={name: step_clock(each, total_steps, windows) for name, each in own_ones.items()}
        )
    node = config.schedule.node
    if node is None:
        return clock
    dotted, target = node["_target_"], targets.admit("schedule", node)
    takes = set(believed_parameters(target) or {})
    batch = config.batch
    changes = batch.counts_tokens or not batch.stages.is_constant
    if "effective_batch" in takes and "effective_batch" not in node and changes:
        raise ConfigError(
            f"schedule._target_={dotted} asks for effective_batch, which is no one number of samples in this run "
            f"({batch.stages.text}{' tokens' if batch.counts_tokens else ''}). Give it a number of its own: "
            "schedule.effective_batch=..."
        )
    span = {"total_steps": total_steps, "effective_batch": config.batch.stages.first}
    given = {name: value for name, value in span.items() if name in takes and name not in node}
    own: Factor
    again: Factor | None = None
    what = f"schedule._target_={dotted}"
    is_torchs = isinstance(target, type) and issubclass(target, LRScheduler)
    if is_torchs or (not isinstance(target, type) and "optimizer" in takes and "step" not in takes):
        make, peak = _torch_schedule(config, node, given)
        checked = check_factor(TorchFactor(make, peak), total_steps, what, TorchFactor(make, peak))
        check_groups_alike(make, peak, checked, total_steps, what)
        return dataclasses.replace(clock, own=checked)
    if not isinstance(target, type) and "step" in takes:
        of_step = instantiate("schedule", {**node, "_partial_": True}, **given)
        own = lambda step: float(of_step(step=step))  # noqa: E731
    else:
        if not isinstance(target, type):
            _check_named(target, node, given)
        own, again = (instantiate("schedule", node, **given) for _ in range(2))
        if not callable(own):
            raise ConfigError(
                f"{what} gave a {type(own).__name__}, not a function of the optimizer step. "
                "Give it __call__(self, step), or name a function with the argument 'step'."
            )
    return dataclasses.replace(clock, own=check_factor(own, total_steps, what, again))


def _check_named(target: Any, node: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse a function whose argument nothing gives: what it is for is told by its name."""
    if node.get("_args_") or node.get("_partial_"):
        return
    for name, each in (believed_parameters(target) or {}).items():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or each.default is not each.empty:
            continue
        if name not in node and name not in given:
            raise ConfigError(
                f"schedule: {node['_target_']} needs the argument {name!r}, which gatrain does not know. Call it "
                "'optimizer' where the function gets one and returns a torch scheduler, or 'step' where it gives "
                f"the factor of optimizer.lr; a value of your own is schedule.{name}=...."
            )


def _make_own_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool | None
) -> torch.optim.Optimizer:
    assert config.node is not None
    dotted, target = config.node["_target_"], targets.admit("optimizer", config.node)
    if isinstance(target, type) and issubclass(target, torch.optim.Optimizer):
        check_step(target)
    takes = believed_parameters(target) or {}
    is_open = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    names = [name for name, each in takes.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    first = "params" if "params" in names or not names else names[0]
    given: dict[str, Any] = {}
    for key in ("lr", "weight_decay"):
        value = getattr(config, key)
        if value and key not in names and not is_open:
            raise ConfigError(
                f"optimizer.{key}={value:g}: {dotted} takes no {key} (it has: {', '.join(names)})."
            )
        if value is not None and (key in names or is_open):
            given[key] = value
    if "weight_decay" not in names and any("weight_decay" in group for group in groups):
        groups = _with_decay_if_known(config, groups, first, given, is_open)
    given[first] = groups
    if fused and "fused" in names and not {"fused", "foreach"} & config.node.keys():
        with contextlib.suppress(ConfigError):  # not for this class, device or combination of options
            return _as_optimizer(dotted, instantiate("optimizer", config.node, **given, fused=True))
    return _as_optimizer(dotted, instantiate("optimizer", config.node, **given))


def _with_decay_if_known(
    config: OptimizerConfig, groups: list[dict[str, Any]], first: str, given: dict[str, Any], is_open: bool
) -> list[dict[str, Any]]:
    """The groups for an optimizer that names no weight decay: what it makes of others shows whether it has one."""
    assert config.node is not None
    dotted = config.node["_target_"]
    without = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    copies = [{**group, "params": [nn.Parameter(p.detach()) for p in group["params"]]} for group in without]
    with kept_random_state():
        probe = _as_optimizer(dotted, instantiate("optimizer", config.node, **given, **{first: copies}))
    if any("weight_decay" in options for options in (probe.defaults, *probe.param_groups)):
        return groups
    if decay := next((value for group in groups if (value := group.get("weight_decay"))), None):
        raise ConfigError(
            f"optimizer.groups: weight_decay={decay:g}: {dotted} has no weight decay. Leave it out of the rule."
        )
    return groups if is_open else without


def _as_optimizer(dotted: str, made: Any) -> torch.optim.Optimizer:
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer._target_={dotted} gave a {type(made).__name__}, not a torch.optim.Optimizer."
        )
    return made


def _torch_schedule(
    config: RunConfig, node: dict[str, Any], given: dict[str, Any]
) -> tuple[Callable[[torch.optim.Optimizer], LRScheduler], float]:
    """What makes the scheduler of an optimizer, and that optimizer's rate."""
    if "epochs" in node:
        given = {}
    if config.optimizer.lr is None:
        raise ConfigError(f"{node['_target_']} needs the peak rate. Give it optimizer.lr=....")

    def make(dummy: torch.optim.Optimizer) -> LRScheduler:
        return check_scheduler(node["_target_"], instantiate("schedule", node, optimizer=dummy, **given))

    return make, config.optimizer.lr
