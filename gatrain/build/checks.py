"""What can be told of the targets of a configuration before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gatrain import doors, targets
from gatrain.build.nodes import instantiate, keywords, nodes_of
from gatrain.build.parts import build_strategy
from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.signatures import certain_parameters, mistake
from gatrain.train.part_norms import check_measurable


def check_targets(config: RunConfig) -> None:
    """Import every `_target_` and compare its keyword names with the signature. Builds nothing.

    Raises:
        ConfigError: a target that does not import, a keyword that it does not have, or one that is missing.
    """
    _check_own_nodes(config)
    for path, node in nodes_of(config):
        target = targets.admit(path, node)
        _check_keywords(
            path,
            node,
            target,
            set(keywords(node)),
            {"model", "data", "loss"} if path == "task" else doors.GIVEN.get(path, set()),
        )
    _check_values(config)


def _check_values(config: RunConfig) -> None:
    """Let the shipped parts of a list look at their values and at the configuration, before anything runs.

    Raises:
        ConfigError: one cannot be so.
    """
    for key in ("hooks", "logger"):
        for where, node in doors.nodes_of(key, getattr(config, key)):
            if doors.is_shipped(node["_target_"]):
                part = instantiate(where, node)
                check = getattr(part, "check", None)
                if check is not None:
                    check(config)
                if getattr(part, "needs_part_norms", False):
                    check_measurable(build_strategy(config))
    if doors.is_shipped(doors.node_of("gradient", config.gradient)["_target_"]):
        build_strategy(config)


def _check_own_nodes(config: RunConfig) -> None:
    """A task of the user's own that takes no model or data needs none in the recipe, and takes none from it.

    Raises:
        ConfigError: one is missing, or given to a task that does not take it.
    """
    dotted = config.task["_target_"]
    parameters = certain_parameters(targets.locate("task", dotted))
    if parameters is None:
        return
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key in ("model", "data", "loss"):
        node, parameter = getattr(config, key), parameters.get(key)
        if node is None and key not in config.task and parameter and parameter.default is parameter.empty:
            raise ConfigError(
                f"{key} has no _target_, but {dotted} takes the argument {key!r}. Name a class or function, for "
                f"example {key}: {{_target_: my_module.MyClass}}, or let {dotted} do without {key!r}."
            )
        if node is not None and parameter is None and not is_open:
            raise ConfigError(
                f"{key}={node['_target_']} is given, but {dotted} takes no argument {key!r}. Remove {key} from the "
                f"recipe, or let {dotted}.__init__ take {key}."
            )


def _check_keywords(
    path: str, node: dict[str, Any], target: Callable[..., Any], given: set[str], extra: set[str]
) -> None:
    """Refuse keywords that the target certainly does not take; in doubt its call tells."""
    if not callable(target):
        raise ConfigError(f"{path}._target_={node['_target_']} is a {type(target).__name__}, not callable.")
    parameters = certain_parameters(target)
    if parameters is None:
        return
    complete = not (node.get("_partial_") or node.get("_args_"))
    if text := mistake(path, node["_target_"], parameters, given, extra, complete=complete):
        raise ConfigError(text)
