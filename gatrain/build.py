"""From configuration to objects: the only place that resolves `_target_`."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gatrain.causes import told
from gatrain.config import RunConfig
from gatrain.construction import build_without_memory_or_really, check_numbers, check_shapes, kept_defaults
from gatrain.errors import ConfigError, GatrainError, chain, nearest
from gatrain.plan import StepSettings
from gatrain.signatures import believed_parameters, certain_parameters, mistake
from gatrain.tasks.base import Task
from gatrain.tasks.parts import map_style
from gatrain.train.engine import Engine, StepClock
from gatrain.train.ranks import Ranks
from gatrain.train.seeding import DATA, MODEL, seeded

NODES = ("model", "data", "loss", "task")


def check_targets(config: RunConfig) -> None:
    """Import every `_target_` and compare its keyword names with the signature. Builds nothing.

    Raises:
        ConfigError: a target that does not import, a keyword that it does not have, or one that is missing.
    """
    _check_own_nodes(config)
    for key in NODES:
        for path, node in _target_nodes(key, getattr(config, key)):
            target = locate(path, node["_target_"])
            _check_keywords(
                path, node, target, _keywords(node), {"model", "data", "loss"} if path == "task" else set()
            )


def build_task(config: RunConfig) -> Task:
    """Make the task with its data. The model is made later, by `build_model`.

    Raises:
        ConfigError: a node cannot be instantiated, or ``task`` is not a Task.
        DataError: the data is missing or unusable.
    """
    return build_task_and_source(config)[0]


def build_task_and_source(config: RunConfig) -> tuple[Task, Any]:
    """As `build_task`, with the data source that the task was given; None where it makes its own."""
    given: dict[str, Any] = {}
    if config.model is not None:
        given["model"] = partial(instantiate, "model", config.model)
    with seeded(config.train.seed, DATA):  # a split drawn at random must be the same on every rank and day
        for key in ("data", "loss"):
            if getattr(config, key) is not None:
                given[key] = instantiate(key, getattr(config, key))
        task = instantiate("task", config.task, **given)
    if not isinstance(task, Task):
        raise ConfigError(
            f"task._target_={config.task['_target_']} gave a {type(task).__name__}, not a gatrain.tasks.Task. "
            "Subclass gatrain.tasks.Task, or use gatrain.tasks.Supervised."
        )
    map_style(task.train_data, "train_data")
    if task.eval_data is not None:
        map_style(task.eval_data, "eval_data")
    return task, given.get("data")


def build_model(task: Task, seed: int, device: torch.device, *, in_place: bool = False) -> nn.Module:
    """Make the model with the run's seed: the same weights on every rank and every world size.

    Args:
        in_place: make it on the device at once, where that works: much quicker, and with other weights.

    Raises:
        ConfigError: it is no module, or has parameters without shape or numbers.
    """
    if in_place and device.type == "cuda":
        # what fails here, wrapped in whatever error, is made on the CPU below
        with contextlib.suppress(Exception), kept_defaults():
            with seeded(seed, MODEL), torch.device(device):
                model = check_shapes(task.build_model())
            check_numbers(model)
            return model.to(device)
    with seeded(seed, MODEL):
        model = check_shapes(task.build_model())
    check_numbers(model)
    return model.to(device)


def model_for_a_look(task: Task, seed: int) -> nn.Module:
    """The model with its shapes, and without memory if it can be made so.

    Raises:
        ConfigError: it cannot be made, for real neither; or is no module with known shapes.
    """

    def really() -> nn.Module:
        with seeded(seed, MODEL):
            return task.build_model()

    return check_shapes(build_without_memory_or_really(task.build_model, really))


def build_engine(
    task: Task,
    config: RunConfig,
    settings: StepSettings,
    device: torch.device,
    clock: StepClock | None = None,
    *,
    in_place: bool = False,
) -> Engine:
    """Make model, optimizer and gradient strategy on this rank's device. All ranks call it together.

    Args:
        in_place: see `build_model`; for trials, where any weights serve.
    """
    model = build_model(task, config.train.seed, device, in_place=in_place)
    nonfinite = config.train.nonfinite
    return Engine(task, model, settings, config.optimizer, Ranks.current(), device, clock, nonfinite)


def instantiate(key: str, node: dict[str, Any], **given: Any) -> Any:
    """Make the object of one configuration node.

    Raises:
        ConfigError: it does not import or does not accept its arguments; GatrainErrors pass through.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    try:
        return hydra_instantiate(node, **given, _convert_="all")
    except InstantiationException as error:
        # Hydra's own error only repeats the first cause
        cause = next((each for each in chain(error) if not isinstance(each, InstantiationException)), error)
        if isinstance(cause, GatrainError):
            raise cause from None
        if isinstance(cause, TypeError) and re.search("unexpected keyword|required .*argument", str(cause)):
            _explain_keywords(key, node, set(given))
        raise ConfigError(told(cause, f"{key}: could not make {node.get('_target_')}: ")) from error


def locate(path: str, dotted: str) -> Any:
    """Import a dotted name.

    Raises:
        ConfigError: the module or the attribute does not exist; names the nearest.
    """
    if "." not in dotted:
        raise ConfigError(f"{path}._target_={dotted!r} has no module. Write it as my_module.{dotted}.")
    parts = dotted.split(".")
    module, rest = None, parts
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            module, rest = importlib.import_module(name), parts[length:]
            break
        except ModuleNotFoundError as error:
            # only "this very module is not there" lets us look further up; a failing import inside it is the news
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(f"{path}._target_={dotted}: importing {name} failed: {error}") from error
            missing = error.name
        except Exception as error:
            raise ConfigError(
                f"{path}._target_={dotted}: importing {name} failed: {type(error).__name__}: {error}"
            ) from error
    if module is None:
        raise ConfigError(
            f"{path}._target_={dotted} does not import: there is no module {missing!r} on the Python path, "
            "which includes the folder where gatrain was started."
        )
    found: Any = module
    for depth, name in enumerate(rest):
        if not hasattr(found, name):
            where = ".".join([module.__name__, *rest[:depth]])
            raise ConfigError(
                f"{path}._target_={dotted} does not import: {where} has no {name!r}."
                f"{nearest(name, [n for n in dir(found) if not n.startswith('_')])}"
            )
        found = getattr(found, name)
    return found


def _check_own_nodes(config: RunConfig) -> None:
    """A task of the user's own that takes no model or data needs none in the recipe, and takes none from it.

    Raises:
        ConfigError: one is missing, or given to a task that does not take it.
    """
    dotted = config.task["_target_"]
    parameters = certain_parameters(locate("task", dotted))
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


def _target_nodes(path: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _target_nodes(f"{path}.{key}", value)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _target_nodes(f"{path}[{index}]", value)


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


def _explain_keywords(path: str, node: dict[str, Any], extra: set[str]) -> None:
    """After a call failed with a TypeError: say it better where the target's own words show a wrong keyword.

    Raises:
        ConfigError: they do.
    """
    for key, inner in _target_nodes(path, node):
        target = locate(key, inner["_target_"])
        parameters = believed_parameters(target)
        if parameters is not None and not inner.get("_args_") and not inner.get("_partial_"):
            more = extra if key == path else set()
            if text := mistake(key, inner["_target_"], parameters, _keywords(inner), more):
                raise ConfigError(text)


def _keywords(node: dict[str, Any]) -> set[str]:
    return set(node) - {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}
