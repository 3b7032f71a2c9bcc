"""Optimizer and schedule of the user's own: sections that are typed for a short name, and open for a `_target_`.

``optimizer._target_=my_module.Mine`` takes the place of the recipe's optimizer. What was set for that one (its
betas, and a rate that stands in the file of its group) is not for the new one; what stands beside the `_target_`,
what is typed, and what the recipe itself says of rate and decay is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gatrain import codec
from gatrain.compose import COMMAND_LINE, DEFAULT
from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.optimizer_config import OPTIMIZERS, OptimizerConfig, OwnOptimizer, OwnSchedule, ScheduleConfig

SECTIONS = ("optimizer", "schedule")
COMMON = (
    "lr",
    "weight_decay",
    "clip_norm",
    "clip_agc",
    "clip_agc_exclude",
    "groups",
    "layer_decay",
    "phases",
)
"""Keys of `OptimizerConfig` that mean the same for every optimizer."""


def settle(composed: DictConfig, setters: dict[str, str], typed_keys: Sequence[str]) -> None:
    """Turn each section with a `_target_` into an open one, without what was meant for another, in place.

    Args:
        setters: who set each dotted key last; corrected for values that were dropped.
        typed_keys: dotted keys of the command line.
    """
    for section in SECTIONS:
        node = composed._get_node(section)
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            continue
        if node.get("_target_") is None:
            continue
        origin = setters.get(f"{section}._target_", DEFAULT)
        if section in typed_keys and origin != COMMAND_LINE and Path(origin).parent.name != section:
            # `optimizer=sgd` was typed, and takes the place of the recipe's own class and of its arguments
            for name in [name for name in node if name not in _typed_keys(section)]:
                if name == "_target_" or f"{section}.{name!s}" not in typed_keys:
                    del node[name]
            continue
        names = [name for name in node if isinstance(name, str)]
        names.sort(key=lambda name: name != "_target_")
        kept = {name: node._get_node(name) for name in names if _is_kept(section, name, setters, origin)}
        if section == "schedule":  # `warmup_steps=3` takes the other way of saying it away
            kept = {name: value for name, value in kept.items() if node[name] is not None}
        _open(node)
        for name, value in kept.items():
            node[name] = value
        for name in COMMON if section == "optimizer" else ():
            if name not in kept:
                node[name] = None
                setters[f"{section}.{name}"] = DEFAULT


def _is_kept(section: str, name: str, setters: Mapping[str, str], origin: str) -> bool:
    if name == "_target_":
        return True
    full = f"{section}.{name}"
    setter = next((setters[key] for key in setters if key == full or key.startswith(f"{full}.")), DEFAULT)
    if setter == DEFAULT:
        return False
    if name != "name" and setter in (COMMAND_LINE, origin):
        return True
    if section == "optimizer" and name in COMMON:
        return Path(setter).parent.name != section  # the file of a group speaks of its own optimizer
    return name not in _typed_keys(section)


def _typed_keys(section: str) -> set[str]:
    classes: list[type[Any]] = [*OPTIMIZERS.values()] if section == "optimizer" else [ScheduleConfig]
    return {item.name for cls in classes for item in dataclasses.fields(cls)}


def _open(node: DictConfig) -> None:
    """Make an empty mapping without types of a typed section."""
    node._metadata.object_type = dict
    node._metadata.ref_type = Any
    OmegaConf.set_struct(node, False)
    for name in list(node):
        del node[name]


def opened(root: DictConfig, stored: DictConfig) -> DictConfig:
    """The schema ``root``, with the sections open to which ``stored`` gives a `_target_`; in place."""
    for section in SECTIONS:
        given = stored._get_node(section)
        if isinstance(given, DictConfig) and not given._is_none() and "_target_" in given:
            node = root._get_node(section)
            assert isinstance(node, DictConfig)
            _open(node)
    return root


def typed(config: RunConfig) -> RunConfig:
    """The same with objects in place of the mappings that `OmegaConf.to_object` makes of open sections.

    Raises:
        ConfigError: a value of another type.
    """
    changes: dict[str, Any] = {}
    if isinstance(config.optimizer, dict):
        values: dict[str, Any] = dict(config.optimizer)
        target = values.pop("_target_")
        hints = {item.name: item.type for item in dataclasses.fields(OptimizerConfig)}
        common = {name: _value(name, values.pop(name, None), str(hints[name])) for name in COMMON}
        values.pop("name", None)
        changes["optimizer"] = OwnOptimizer(target=target, arguments=values, **common)
    if isinstance(config.schedule, dict):
        values = dict(config.schedule)
        changes["schedule"] = OwnSchedule(target=values.pop("_target_"), arguments=values)
    for section, made in changes.items():
        if not isinstance(made.target, str):
            raise ConfigError(
                f"{section}._target_={made.target!r} is not the dotted name of a class or function."
            )
    return dataclasses.replace(config, **changes) if changes else config


def _value(name: str, value: Any, hint: str) -> Any:
    if "Any" in hint:
        return value
    try:
        return codec.decode(float | None, value)  # type: ignore[arg-type]
    except ValueError:
        raise ConfigError(
            f"optimizer.{name}={value} does not fit: optimizer.{name} takes a number."
        ) from None


def drop_left_over(
    composed: DictConfig, setters: dict[str, str], typed_keys: Sequence[str], defaults: Mapping[str, Any]
) -> None:
    """Take out what the recipe set for its own optimizer, in whose place another was typed, in place.

    Args:
        setters: who set each dotted key last; corrected.
        typed_keys: dotted keys of the command line.
        defaults: what the file of the typed optimizer gives, by dotted key.
    """
    node = composed.optimizer
    cls = OPTIMIZERS.get(node.get("name"))
    fields = {item.name: item.default for item in dataclasses.fields(cls)} if cls is not None else {}
    for name in fields:
        key, setter = f"optimizer.{name}", setters.get(f"optimizer.{name}", DEFAULT)
        if name in (*COMMON, "name") or key in typed_keys or setter in (DEFAULT, COMMAND_LINE):
            continue
        if Path(setter).parent.name != "optimizer":
            value = defaults.get(key, fields[name])
            node[name] = list(value) if isinstance(value, tuple) else value
            setters[key] = DEFAULT
