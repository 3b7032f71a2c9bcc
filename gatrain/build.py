"""From configuration to objects: the only place that resolves `_target_`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gatrain.config import RunConfig
from gatrain.errors import ConfigError, GatrainError, nearest
from gatrain.plan import StepSettings
from gatrain.tasks.base import Task
from gatrain.train.checkpointing import available_modes
from gatrain.train.engine import Engine, StepClock
from gatrain.train.ranks import Ranks
from gatrain.train.windows import derive_seed

NODES = ("model", "data", "loss", "task")
_GIVEN_BY_GATRAIN = {"task": {"model", "data", "loss"}}
_MODEL_SEED = 0x6D6F64656C  # "model": keeps initial weights apart from every other use of the run's seed


def check_targets(config: RunConfig) -> None:
    """Import every `_target_` and compare its keyword names with the signature. Builds nothing.

    Raises:
        ConfigError: a target that does not import, a keyword that it does not have, or one that is missing.
    """
    for key in NODES:
        for path, node in _target_nodes(key, getattr(config, key)):
            target = locate(path, node["_target_"])
            given = set(node) - {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}
            extra = _GIVEN_BY_GATRAIN.get(path, set())
            _check_keywords(path, node, target, given, extra)


def build_task(config: RunConfig) -> Task:
    """Make the task with its data. The model is made later, by `build_model`.

    Raises:
        ConfigError: a node cannot be instantiated, or ``task`` is not a Task.
        DataError: the data is missing or unusable.
    """
    data = instantiate("data", config.data)
    loss = instantiate("loss", config.loss) if config.loss is not None else None
    model_factory = partial(instantiate, "model", config.model)
    given: dict[str, Any] = {"model": model_factory, "data": data}
    if loss is not None:
        given["loss"] = loss
    task = instantiate("task", config.task, **given)
    if not isinstance(task, Task):
        raise ConfigError(
            f"task._target_={config.task['_target_']} gave a {type(task).__name__}, not a gatrain.tasks.Task. "
            "Subclass gatrain.tasks.Task, or use gatrain.tasks.Supervised."
        )
    return task


def build_model(task: Task, seed: int, device: torch.device, *, in_place: bool = False) -> nn.Module:
    """Make the model with the run's seed: the same weights on every rank and every world size.

    Args:
        in_place: make it on the device at once, where that works: much quicker, and with other weights.
    """
    if in_place and device.type == "cuda":
        with contextlib.suppress(RuntimeError, NotImplementedError), torch.device(device):
            torch.manual_seed(derive_seed(seed, _MODEL_SEED))
            if isinstance(model := task.build_model(), nn.Module):
                return model.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, _MODEL_SEED))
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model gave a {type(model).__name__}, not a torch.nn.Module.")
    return model.to(device)


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
    return Engine(task, model, settings, config.optimizer, Ranks.current(), device, clock)


def available_checkpointing(task: Task) -> tuple[str, ...]:
    """Which modes of activation checkpointing the task's model offers; builds it without memory."""
    try:
        return available_modes(build_on_meta(task))
    except GatrainError:
        raise
    except Exception:  # a model that cannot be built without memory: ask the real one
        return available_modes(task.build_model())


def build_on_meta(task: Task) -> nn.Module:
    """The model with shapes but no memory, however large it is."""
    with torch.device("meta"):
        return task.build_model()


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
        cause: BaseException | None = error.__cause__
        if isinstance(cause, GatrainError):
            raise cause from None
        text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error).splitlines()[0]
        raise ConfigError(f"{key}: could not make {node.get('_target_')}: {text}") from error


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
    if not callable(target):
        raise ConfigError(f"{path}._target_={node['_target_']} is a {type(target).__name__}, not callable.")
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # built in C: nothing to compare with
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in sorted(given - set(named)):
            allowed = ", ".join(sorted(set(named) - extra)) or "none"
            raise ConfigError(
                f"{path}.{name} is not an argument of {node['_target_']} (it has: {allowed})."
                f"{nearest(name, set(named) - extra)}"
            )
    if node.get("_partial_") or node.get("_args_"):
        return
    for name in named:
        if parameters[name].default is inspect.Parameter.empty and name not in given | extra:
            raise ConfigError(
                f"{path}: {node['_target_']} needs the argument {name!r}. Add {path}.{name}=... "
                f"(+{path}.{name}=... on the command line)."
            )
