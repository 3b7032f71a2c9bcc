"""One optimizer for each phase of a task, over its own part of the model; together they are saved as one."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gatrain.errors import ConfigError, nearest
from gatrain.optimizer_config import OptimizerConfig
from gatrain.phase_config import PhaseConfig, phase_configs
from gatrain.tasks.base import Task, phases_of
from gatrain.train import clipping
from gatrain.train.groups import Grouping, group_parameters
from gatrain.train.optimizer import Built, Maker, build_optimizer, counted_state
from gatrain.train.optimizer_state import Behaviour, options_of

MakerOf = Callable[[OptimizerConfig], Maker | None]


@dataclass
class Part:
    """One phase's optimizer, and its part of the model."""

    built: Built
    clips: list[clipping.Part]
    """How its gradient is clipped."""
    rate: float = math.nan
    """As it was last set."""

    @property
    def lr(self) -> float:
        """Its peak rate."""
        return self.built.lr

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.built.optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the model itself, those that are trained."""
        return [parameter for group in self.built.grouping.groups for parameter in group.parameters]

    def set_rate(self, lr: float) -> None:
        self.rate = lr
        self.built.set_rate(lr)


class PhasedOptimizer(torch.optim.Optimizer):
    """The optimizers of several phases: their groups are its groups, and all keep their state in one mapping.

    ``step()`` steps all of them, which a run never does: `gatrain.train.gradient.phases` steps one at a time.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__([group for part in parts.values() for group in part.optimizer.param_groups], {})
        self.parts = dict(parts)
        for part in self.parts.values():
            self.state.update(part.optimizer.state)  # some make it at once
            part.optimizer.state = self.state
        names = (f"{name}: {type(part.optimizer).__name__}" for name, part in self.parts.items())
        self.saved_name = ", ".join(names)
        """In place of the class, in a saved state."""
        self.most_updates = 1
        """That one of them makes in a window."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for part in self.parts.values():
            part.optimizer.step()


def groupings(
    task: Task, config: OptimizerConfig, model: nn.Module
) -> dict[str, tuple[OptimizerConfig, Grouping]]:
    """The groups of each phase's parameters with its optimizer's configuration; of a task without phases all
    parameters, under the name ''. Freezes what the rules freeze.

    Raises:
        ConfigError: as `group_parameters`; a parameter of no phase or of two.
    """
    phases = phases_of(task)
    if not phases:
        return {"": (config, group_parameters(config, model))}
    configs = configs_of(config, phases)
    names = _names_of(configs, model)
    found = {
        phase: (each.optimizer, group_parameters(each.optimizer, model, names[phase]))
        for phase, each in configs.items()
    }
    for phase, (_, grouping) in found.items():
        if not grouping.groups:
            raise ConfigError(f"the phase {phase} has no parameter to train: all of them are frozen.")
    return found


def configs_of(config: OptimizerConfig, phases: Collection[str]) -> dict[str, PhaseConfig]:
    """The configuration of each of a task's phases, in the task's order.

    Raises:
        ConfigError: ``optimizer.phases`` names a phase that the task does not have.
    """
    given = phase_configs(config)
    for name in given:
        if name not in phases:
            raise ConfigError(
                f"optimizer.phases.{name}: the task has no such phase.{nearest(name, phases)} It has: "
                f"{', '.join(phases)}."
            )
    return {name: given[name] if name in given else PhaseConfig.usual(name, config) for name in phases}


def build_for(
    task: Task,
    config: OptimizerConfig,
    grouped: Mapping[str, tuple[OptimizerConfig, Grouping]],
    of: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    *,
    sparse: Collection[int] = (),
    maker_of: MakerOf = lambda config: None,
    try_first: bool = True,
) -> Built:
    """`build_optimizer` for what `groupings` gave: one optimizer, or those of the phases together.

    Args:
        maker_of: makes those of the user's own, whose configuration has a ``node``; None for the shipped ones.
    """
    made = {
        name: build_optimizer(
            each,
            grouping,
            of,
            sparse=sparse,
            maker=maker_of(each),
            try_first=try_first,
        )
        for name, (each, grouping) in grouped.items()
    }
    if not task.phases:
        return made[""]
    optimizer = PhasedOptimizer({n: Part(built, grouped[n][1].clips) for n, built in made.items()})
    return Built(
        optimizer=optimizer,
        lr=next(iter(made.values())).lr,
        scales=[scale for built in made.values() for scale in built.scales],
        grouping=joined([built.grouping for built in made.values()]),
        begun=options_of(optimizer),
        behaviour=Behaviour(
            can_be_primed=all(built.behaviour.can_be_primed for built in made.values()),
            counts_in_groups=any(built.behaviour.counts_in_groups for built in made.values()),
        ),
        late=lambda: next((text for built in made.values() if (text := built.late())), ""),
    )


def counted_for(
    grouped: Mapping[str, tuple[OptimizerConfig, Grouping]], sparse: Collection[int], maker_of: MakerOf
) -> list[int]:
    """`counted_state` of what `groupings` gave, of all phases together."""
    return [
        size
        for each, grouping in grouped.values()
        for size in counted_state(each, grouping, sparse, maker_of(each))
    ]


def joined(parts: Iterable[Grouping]) -> Grouping:
    """All groups of several groupings of one model."""
    listed = list(parts)
    return Grouping(
        groups=[group for each in listed for group in each.groups],
        exempt=[name for each in listed for name in each.exempt],
        thaw_at={name: at for each in listed for name, at in each.thaw_at.items()},
        frozen=[name for each in listed for name in each.frozen],
        clips=[part for each in listed for part in each.clips],
        not_clipped=[name for each in listed for name in each.not_clipped],
    )


def _names_of(configs: Mapping[str, PhaseConfig], model: nn.Module) -> dict[str, set[str]]:
    """Names of each phase's parameters. What is frozen already may belong to none.

    Raises:
        ConfigError: a trained parameter of none or of two, or a phase that has none.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    owners = {
        name: [phase for phase, each in configs.items() if _matches(each.match, aliases[id(parameter)])]
        for name, parameter in model.named_parameters()
    }
    found = {phase: {name for name, each in owners.items() if phase in each} for phase in configs}
    for phase, names in found.items():
        if not names:
            known = list(dict.fromkeys(name.partition(".")[0] for name in owners))
            raise ConfigError(
                f"optimizer.phases.{phase}.match={list(configs[phase].match)} matches no parameter of "
                f"{type(model).__name__}. Its parts: {', '.join(known[:8])}. Write for example "
                f"\"optimizer.phases.{phase}.match='{known[0] if known else '*'}.*'\"."
            )
    for name, parameter in model.named_parameters():
        if len(owners[name]) > 1:
            raise ConfigError(
                f"the parameter {name} belongs to the phases {' and '.join(owners[name])}: two optimizers would "
                f"step it. Write optimizer.phases.{owners[name][0]}.match so that each parameter is in one phase."
            )
        if not owners[name] and parameter.requires_grad:
            patterns = ", ".join(f"{phase}: {' '.join(each.match)}" for phase, each in configs.items())
            raise ConfigError(
                f"the parameter {name} belongs to no phase ({patterns}), so nothing would train it. Give it to one "
                f"by optimizer.phases.{next(iter(configs))}.match, or set requires_grad = False in the model."
            )
    return found


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def frozen_but(phase: str, grouped: Mapping[str, tuple[OptimizerConfig, Grouping]]) -> list[Any]:
    """The trained parameters of every other phase."""
    return [
        parameter
        for name, (_, grouping) in grouped.items()
        if name != phase
        for group in grouping.groups
        for parameter in group.parameters
    ]
