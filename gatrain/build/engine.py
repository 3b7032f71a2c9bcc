"""The model with the run's seed, and the engine that trains it."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from gatrain.build.optimizer import optimizer_maker
from gatrain.build.parts import build_hooks, build_norm, build_parallel, build_random, build_strategy
from gatrain.config import RunConfig
from gatrain.construction import build_without_memory_or_really, check_numbers, check_shapes, kept_defaults
from gatrain.plan import StepSettings
from gatrain.tasks.base import Task
from gatrain.train.engine import Engine, StepClock
from gatrain.train.norm import Normalisation
from gatrain.train.ranks import Ranks
from gatrain.train.seeding import MODEL, seeded

_AS_MADE = Normalisation()


def build_model(
    task: Task,
    seed: int,
    device: torch.device,
    *,
    norm: Normalisation = _AS_MADE,
    in_place: bool = False,
) -> nn.Module:
    """Make the model with the run's seed: the same weights on every rank and every world size.

    Args:
        norm: what is done about its BatchNorm layers (`build_norm`).
        in_place: make it on the device at once, where that works: much quicker, and with other weights.

    Raises:
        ConfigError: it is no module, or has parameters without shape or numbers.
    """
    if in_place and device.type == "cuda":
        # what fails here, wrapped in whatever error, is made on the CPU below
        with contextlib.suppress(Exception), kept_defaults():
            with seeded(seed, MODEL), torch.device(device):
                model = norm.convert(check_shapes(task.build_model()))
            check_numbers(model)
            return model.to(device)
    with seeded(seed, MODEL):
        model = norm.convert(check_shapes(task.build_model()))
    check_numbers(model)
    return model.to(device)


def model_for_a_look(task: Task, seed: int, norm: Normalisation = _AS_MADE) -> nn.Module:
    """The model with its shapes, and without memory if it can be made so.

    Raises:
        ConfigError: it cannot be made, for real neither; or is no module with known shapes.
    """

    def really() -> nn.Module:
        with seeded(seed, MODEL):
            return task.build_model()

    return norm.convert(check_shapes(build_without_memory_or_really(task.build_model, really)))


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
    norm = build_norm(config)
    model = build_model(task, config.train.seed, device, norm=norm, in_place=in_place)
    engine = Engine(
        task,
        model,
        settings,
        config.optimizer,
        Ranks.current(),
        device,
        clock,
        config.train.nonfinite,
        strategy=build_strategy(config),
        parallel=build_parallel(config),
        maker_of=optimizer_maker,
        batch_rule=(config.batch.rule, config.batch.rule_base),
        random=build_random(config),
    )
    norm.attach(engine.step)
    if in_place and config.hooks:
        held = sum(hook.device_bytes(model) for hook in build_hooks(config).values())
        engine.reserved = torch.ones(held, dtype=torch.uint8, device=device)
    return engine
