"""Objects of configuration nodes: the only place that calls what a `_target_` names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from gatrain import doors, targets
from gatrain.causes import told
from gatrain.config import OPEN_NODES, RunConfig
from gatrain.errors import ConfigError, GatrainError
from gatrain.phase_config import phase_configs
from gatrain.signatures import believed_parameters, certain_parameters, mistake

T = TypeVar("T")


def nodes_of(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_` that the configuration names, nested ones included, with its place."""
    for key in OPEN_NODES:
        yield from targets.nodes(key, getattr(config, key))
    for key in ("optimizer", "schedule"):  # by short name they are typed, and name no node
        if (node := getattr(config, key).node) is not None:
            yield from targets.nodes(key, node)
    for name, phase in phase_configs(config.optimizer).items():
        for key, part in (("optimizer", phase.optimizer), ("schedule", phase.schedule)):
            if part is not None and (node := part.node) is not None and node != getattr(config, key).node:
                yield from targets.nodes(f"optimizer.phases.{name}", node)
    for key in doors.SHIPPED:
        for where, node in doors.nodes_of(key, getattr(config, key)):
            yield from targets.nodes(where, node)


def parts_named(config: RunConfig, door: str) -> Iterator[tuple[str, Any]]:
    """Each part that the configuration names at a door: its short name, or its ``_target_``, and the class.

    Raises:
        ConfigError: there is no such part, or it is refused.
    """
    names = {dotted: name for name, dotted in doors.SHIPPED[door].items()}
    for where, node in doors.nodes_of(door, getattr(config, door)):
        yield names.get(node["_target_"], node["_target_"]), targets.admit(where, node)


def instantiate(key: str, node: dict[str, Any], **given: Any) -> Any:
    """Make the object of one configuration node, and those of the nodes inside it.

    ``_args_``, ``_partial_``, ``_recursive_`` and ``_convert_`` mean what they mean in Hydra.

    Args:
        key: the node's key, for messages.
        node: the mapping with ``_target_``; it is not changed.
        given: arguments that gatrain adds.

    Raises:
        ConfigError: it does not import, is refused or does not accept its arguments; GatrainErrors pass through.
    """
    for path, inner in targets.nodes(key, node):  # all of them, before the first is called
        targets.admit(path, inner)
    return _make(key, node, given, recursive=True, convert="all")


def part(key: str, value: Any, **given: Any) -> Any:
    """The one object of a door, with those of the keywords ``given`` that it takes."""
    node = doors.node_of(key, value)
    target = targets.admit(key, node)
    parameters = certain_parameters(target) if callable(target) else None
    if parameters is not None and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        given = {name: each for name, each in given.items() if name in parameters}
    return instantiate(key, node, **given)


def part_of(key: str, value: Any, kind: type[T]) -> T:
    """Make a part that a door takes one of.

    Raises:
        ConfigError: it is of another kind.
    """
    made = part(key, value)
    if not isinstance(made, kind):
        shipped = next(iter(doors.SHIPPED[key]))
        raise ConfigError(
            f"{key}={doors.node_of(key, value)['_target_']} gave a {type(made).__name__}, not a "
            f"{kind.__module__}.{kind.__name__}. Subclass {kind.__name__}, or write {key}={shipped}."
        )
    return made


def explain_keywords(path: str, node: dict[str, Any], target: Callable[..., Any], extra: set[str]) -> None:
    """After a call failed with a TypeError: say it better where the target's own words show a wrong keyword.

    Raises:
        ConfigError: they do.
    """
    parameters = believed_parameters(target)
    if parameters is None or node.get("_args_") or node.get("_partial_"):
        return
    if text := mistake(path, node["_target_"], parameters, set(keywords(node)), extra):
        raise ConfigError(text)


def keywords(node: dict[str, Any]) -> list[str]:
    return [
        name for name in node if name not in ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
    ]


def _make(path: str, node: dict[str, Any], given: dict[str, Any], *, recursive: bool, convert: str) -> Any:
    recursive, convert = _flag(path, node, "_recursive_", recursive), str(node.get("_convert_", convert))
    partial_ = _flag(path, node, "_partial_", False)
    target = targets.admit(path, node)
    if not callable(target):
        raise ConfigError(f"{path}._target_={node['_target_']} is a {type(target).__name__}, not callable.")

    def value(where: str, each: Any) -> Any:
        made = _value(where, each, recursive, convert) if recursive else copy.deepcopy(each)
        return _as_container(made) if convert == "none" else made

    args = node.get("_args_") or []
    if not isinstance(args, list | tuple):
        raise ConfigError(f"{path}._args_ is {args!r}, not a list.")
    positional = [value(f"{path}._args_[{index}]", each) for index, each in enumerate(args)]
    named = {
        name: value(f"{path}.{name}", node[name]) for name in keywords(node) if name not in given
    } | given
    try:
        return partial(target, *positional, **named) if partial_ else target(*positional, **named)
    except GatrainError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and re.search("unexpected keyword|required .*argument", str(error)):
            explain_keywords(path, node, target, set(given))
        raise ConfigError(told(error, f"{path}: could not make {node['_target_']}: ")) from error


def _value(path: str, value: Any, recursive: bool, convert: str) -> Any:
    """A value with every node in it made."""
    if isinstance(value, dict):
        if "_target_" in value:
            return _make(path, value, {}, recursive=recursive, convert=convert)
        return {name: _value(f"{path}.{name}", each, recursive, convert) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_value(f"{path}[{index}]", each, recursive, convert) for index, each in enumerate(value)]
    return value


def _as_container(value: Any) -> Any:
    """What ``_convert_: none`` asks for: mappings and lists as OmegaConf's own."""
    if not isinstance(value, dict | list):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.create(value, flags={"allow_objects": True})


def _flag(path: str, node: dict[str, Any], name: str, default: bool) -> bool:
    value = node.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{path}.{name}={value!r} is not true or false.")
    return value
