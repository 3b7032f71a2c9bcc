"""The task with its data, and what must go with it."""

from __future__ import annotations

from functools import partial
from typing import Any

from gatrain import targets
from gatrain.build.nodes import instantiate, nodes_of
from gatrain.build.parts import build_strategy
from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.tasks.base import Task, phases_of
from gatrain.tasks.parts import map_style
from gatrain.tasks.streams import Stream
from gatrain.train.phased_optimizer import configs_of
from gatrain.train.seeding import DATA, seeded


def build_task(config: RunConfig) -> Task:
    """Make the task with its data. The model is made later, by `build_model`.

    Raises:
        ConfigError: a node cannot be instantiated, or ``task`` is not a Task.
        DataError: the data is missing or unusable.
    """
    return build_task_and_source(config)[0]


def build_task_and_source(config: RunConfig) -> tuple[Task, Any]:
    """As `build_task`, with the data source that the task was given; None where it makes its own."""
    for path, node in nodes_of(config):
        targets.admit(path, node)
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
    task.train_data = map_style(task.train_data, "train_data")
    if task.eval_data is not None:
        task.eval_data = map_style(task.eval_data, "eval_data")
    _check_streams(task, config)
    _check_phases(task, config)
    return task, given.get("data")


def _check_phases(task: Task, config: RunConfig) -> None:
    """A task with phases needs a strategy that trains them, and the other way round.

    Raises:
        ConfigError: one without the other.
    """
    phases, trains = phases_of(task), build_strategy(config).trains_phases
    if phases and not trains:
        raise ConfigError(
            f"{type(task).__name__} has the phases {', '.join(phases)}, each with an optimizer of its own, and "
            f"gradient={config.gradient!r} knows one optimizer alone. Use gradient=phases."
        )
    if trains and not phases:
        raise ConfigError(
            f"gradient=phases needs a task with phases, and {type(task).__name__} has none. Write for example "
            "phases = ('discriminator', 'generator') and loss_sum(self, model, batch, phase), or no gradient."
        )
    if config.optimizer.phases is not None and not phases:
        raise ConfigError(
            f"optimizer.phases is given, and {type(task).__name__} has no phases. Use gradient=phases with a task "
            "that has phases, or leave optimizer.phases out."
        )
    configs_of(config.optimizer, phases)


def _check_streams(task: Task, config: RunConfig) -> None:
    """What a stream cannot tell must be given.

    Raises:
        ConfigError: train.steps, or eval.samples, is missing; or an order is given.
    """
    if isinstance(task.eval_data, Stream):
        if config.eval.samples is None:
            raise ConfigError(
                f"{task.eval_data.name} is a stream, which does not tell how many samples it has. Say how many an "
                "evaluation takes, for example eval.samples=1000."
            )
        task.eval_data.most = config.eval.samples
    if not isinstance(task.train_data, Stream):
        return
    name = task.train_data.name
    if config.train.steps is None:
        raise ConfigError(
            f"{name} is a stream, which does not tell how many samples it has, so "
            f"train.epochs={config.train.epochs} has no meaning for it. Use for example train.steps=1000 "
            "train.epochs=null."
        )
    if config.order not in ("shuffle", "sequential"):
        raise ConfigError(
            f"{name} is a stream, which is read in its own order: order={config.order!r} needs samples by "
            "number. Leave order out, or give a dataset with __len__ and __getitem__."
        )
