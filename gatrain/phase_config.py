"""``optimizer.phases``: the optimizer of each phase of a task, where several train parts of one model in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatrain import codec
from gatrain.errors import ConfigError, nearest
from gatrain.optimizer_config import (
    OPTIMIZERS,
    OptimizerConfig,
    OwnOptimizer,
    OwnSchedule,
    ScheduleConfig,
    check_optimizer,
    check_schedule,
)

_EXAMPLE = (
    "'optimizer.phases={critic: {lr: 2e-4}, actor: {lr: 1e-4}}', where a phase's parameters are those of the "
    "model's part of the same name, or of match: 'pattern.*'"
)
_NOT_FOR_PHASES = ("groups", "layer_decay")
"""Of the optimizer as a whole; a phase has its own."""


@dataclass(frozen=True)
class PhaseConfig:
    """One phase's parameters and how they are stepped."""

    match: tuple[str, ...]
    """Patterns of the names of its parameters."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig | None
    """None is that of the run."""

    @classmethod
    def usual(cls, name: str, optimizer: OptimizerConfig) -> PhaseConfig:
        """Of a phase that ``optimizer.phases`` says nothing of."""
        return cls((f"{name}.*",), dataclasses.replace(optimizer, phases=None), None)


def phase_configs(optimizer: OptimizerConfig) -> dict[str, PhaseConfig]:
    """The phases that a configuration names, in its order.

    What one leaves out is as in ``optimizer``; under another ``name`` or a ``_target_`` it is that optimizer's own
    default.

    Raises:
        ConfigError: a key or a value that cannot be.
    """
    given = optimizer.phases
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"optimizer.phases={given!r} names no phases. Write for example {_EXAMPLE}.")
    for key in _NOT_FOR_PHASES:
        if getattr(optimizer, key) is not None:
            raise ConfigError(
                f"optimizer.{key} is given beside optimizer.phases. Write it under the phase that it is for: "
                f"optimizer.phases.{next(iter(given))}.{key}."
            )
    return {str(name): _phase(str(name), values, optimizer) for name, values in given.items()}


def _phase(name: str, values: Any, outer: OptimizerConfig) -> PhaseConfig:
    where = f"optimizer.phases.{name}"
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={values!r} is no mapping. Write for example {_EXAMPLE}.")
    values = dict(values)
    match = values.pop("match", f"{name}.*")
    match = [match] if isinstance(match, str) else match
    if not isinstance(match, list | tuple) or not match or not all(isinstance(each, str) for each in match):
        raise ConfigError(f"{where}.match={match!r} is no pattern such as '{name}.*', nor a list of them.")
    schedule = _schedule(f"{where}.schedule", values.pop("schedule", None))
    made = _optimizer(where, values, outer)
    if made.layer_decay is not None:
        raise ConfigError(f"{where}.layer_decay is not for a phase. Write groups with lr_scale instead.")
    for rule in made.groups if isinstance(made.groups, list | tuple) else ():
        if isinstance(rule, Mapping) and "thaw_at" in rule:
            raise ConfigError(f"{where}.groups: thaw_at is not for a phase. Use frozen, or leave it out.")
    if made.gradient is not None:
        given = outer if made.name == outer.name else made
        key = "optimizer" if given is outer else f"{where}.name"
        raise ConfigError(
            f"{key}={given.name} takes gradients in a way of its own, which no phase can. Use {key}=adamw."
        )
    try:
        check_optimizer(made)
    except ConfigError as error:
        raise ConfigError(str(error).replace("optimizer.", f"{where}.")) from error
    return PhaseConfig(tuple(match), made, schedule)


def _optimizer(where: str, values: dict[str, Any], outer: OptimizerConfig) -> OptimizerConfig:
    target, name = values.pop("_target_", None), values.pop("name", None)
    clips = {key: getattr(outer, key) for key in ("clip_norm", "clip_agc", "clip_agc_exclude")}
    if target is not None:
        if not isinstance(target, str):
            raise ConfigError(f"{where}._target_={target!r} is not the dotted name of a class or function.")
        base: OptimizerConfig = OwnOptimizer(target=target, **clips)
    elif name is None or name == outer.name:
        base = dataclasses.replace(outer, phases=None)
    elif name in OPTIMIZERS:
        base = dataclasses.replace(OPTIMIZERS[name](), **clips)
    else:
        raise ConfigError(
            f"{where}.name={name!r} is not one of {', '.join(OPTIMIZERS)}.{nearest(str(name), OPTIMIZERS)}"
        )
    if isinstance(base, OwnOptimizer):
        common = [item.name for item in dataclasses.fields(OptimizerConfig)]
        own = {key: values.pop(key) for key in list(values) if key not in common}
        base = dataclasses.replace(base, arguments={**(base.arguments or {}), **own})
    made: OptimizerConfig = _replaced(where, base, values)
    return made


def _schedule(where: str, values: Any) -> ScheduleConfig | None:
    if values is None:
        return None
    if isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}={values!r} names no schedule. Write for example {{name: constant}}.")
    values = dict(values)
    if (target := values.pop("_target_", None)) is not None:
        return OwnSchedule(target=target, arguments=values)
    made: ScheduleConfig = _replaced(where, ScheduleConfig(), values)
    try:
        check_schedule(made)
    except ConfigError as error:
        raise ConfigError(str(error).replace("schedule.", f"{where}.")) from error
    return made


def _replaced(where: str, base: Any, values: Mapping[str, Any]) -> Any:
    """``base`` with some of its fields replaced, each of its declared type."""
    fields = [
        item.name for item in dataclasses.fields(base) if item.name not in ("phases", "target", "arguments")
    ]
    for key in values:
        if key not in fields:
            extra = ["match", "schedule"] if isinstance(base, OptimizerConfig) else []
            raise ConfigError(
                f"{where}.{key} is no key of a phase with {base.name}.{nearest(str(key), [*fields, *extra])} "
                f"Known: {', '.join([*extra, *fields])}."
            )
    encoded = {**codec.encode(base), **values}
    try:
        return codec.decode(type(base), {key: encoded[key] for key in encoded})
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from error
