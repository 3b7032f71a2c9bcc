"""From configuration to objects: the only place that calls what a `_target_` names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gatrain import doors, targets
from gatrain.batch import typical_samples
from gatrain.causes import told
from gatrain.config import OPEN_NODES, REDUCE_OVERHEAD, OptimizerConfig, RunConfig
from gatrain.construction import build_without_memory_or_really, check_numbers, check_shapes, kept_defaults
from gatrain.errors import ConfigError, DataError, GatrainError
from gatrain.phase_config import phase_configs
from gatrain.plan import StepSettings
from gatrain.signatures import believed_parameters, certain_parameters, mistake
from gatrain.tasks.base import Task, phases_of
from gatrain.tasks.parts import map_style
from gatrain.tasks.streams import ENDLESS, Stream
from gatrain.train import order
from gatrain.train.dropout import RandomNumbers
from gatrain.train.engine import Engine, StepClock
from gatrain.train.events import Sink
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.hook import Hook
from gatrain.train.hooks import named
from gatrain.train.knobs import Knobs, by_name
from gatrain.train.modules import sparse_parameters
from gatrain.train.norm import Normalisation
from gatrain.train.optimizer import Maker, check_takes_sparse
from gatrain.train.optimizer_state import check_step
from gatrain.train.order.grouped import Grouped
from gatrain.train.order.sequential import Sequential
from gatrain.train.parallel import Replicated
from gatrain.train.part_norms import check_measurable
from gatrain.train.phased_optimizer import configs_of, counted_for, groupings
from gatrain.train.ranks import Ranks
from gatrain.train.schedule import Factor, TorchFactor, check_factor, check_schedule_class
from gatrain.train.seeding import DATA, MODEL, seeded
from gatrain.train.stream_loader import StreamWindows
from gatrain.train.token_places import Lengths, TokenPlaces, token_lengths
from gatrain.train.token_windows import TokenWindows
from gatrain.train.windows import WindowSchedule

T = TypeVar("T")
_AS_MADE = Normalisation()


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
            set(_keywords(node)),
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


def window_schedule(config: RunConfig, task: Task, effective_batch: int | None = None) -> WindowSchedule:
    """The windows of a run. ``effective_batch`` stands for the configured one, where only a look is wanted.

    Raises:
        ConfigError: the order cannot be made, or is none.
        DataError: no window could be filled.
    """
    data, seed, total = task.train_data, config.train.seed, len(task.train_data)
    effective = effective_batch or config.batch.largest
    lengths: int | Lengths = 0
    if by_tokens := config.batch.counts_tokens and effective_batch is None:
        if isinstance(data, Stream):
            raise ConfigError(
                f"{data.name} is a stream, whose samples' lengths nobody knows before they are read, so "
                "batch.count=tokens has no place in it. Count samples, or give a dataset with lengths."
            )
        lengths = token_lengths(task, seed, "batch.count=tokens")
        effective = typical_samples(effective, float(np.mean(lengths)), total)
    stages = None if effective_batch is not None or config.batch.stages.is_constant else config.batch.stages
    if isinstance(data, Stream):
        if stages is not None and stages.by != "steps":
            raise ConfigError(
                f"{data.name} is a stream, of which nobody knows how many samples an epoch has, so "
                f"batch.effective_by={stages.by} has no place in it. Let stages begin at steps."
            )
        if data.is_whole and total < effective:
            raise DataError(
                f"{data.name} is a stream of {total} samples, fewer than batch.effective={effective}: no window "
                f"could be filled. Use batch.effective={max(total, 1)} or less, or more data."
            )
        endless = ENDLESS * effective
        return StreamWindows(endless, effective, seed, config.train.drop_last, first=total, stages=stages)
    own = order.of_data(data)
    if config.order == "shuffle":
        made = None if own is None else own(seed)
    elif own is not None:
        raise ConfigError(
            f"order={config.order!r} has no meaning for a {type(data).__name__}, which has an order of its "
            "own. Leave order out."
        )
    else:
        # an order that lays out windows: smaller ones make up larger ones
        smallest = effective if stages is None else stages.smallest
        made = _part("order", config.order, data=data, seed=seed, effective_batch=smallest)
        if not isinstance(made, order.Order):
            raise ConfigError(
                f"order gave a {type(made).__name__}, which has no method ids(epoch, positions) that gives the "
                "numbers of the samples at these positions."
            )
    samples = getattr(made, "samples", total)
    tokens = None
    if by_tokens:
        budget, drop_last = config.batch.largest, config.train.drop_last
        return TokenWindows(samples, effective, seed, drop_last, made, total, budget=budget, lengths=lengths)
    plain = WindowSchedule(samples, effective, seed, config.train.drop_last, made, total)
    if stages is None:
        return plain
    if stages.by == "tokens":
        lengths = token_lengths(task, seed, "batch.effective_by=tokens")
        each_once = made is None or isinstance(made, Grouped | Sequential)
        tokens = TokenPlaces(lengths, plain.ids, each_once)
    return dataclasses.replace(plain, stages=stages, tokens=tokens)


def _part(key: str, value: Any, **given: Any) -> Any:
    """The one object of a door, with those of the keywords ``given`` that it takes."""
    node = doors.node_of(key, value)
    target = targets.admit(key, node)
    parameters = certain_parameters(target) if callable(target) else None
    if parameters is not None and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        given = {name: each for name, each in given.items() if name in parameters}
    return instantiate(key, node, **given)


def build_hooks(config: RunConfig) -> dict[str, Hook]:
    """Make the hooks of a run, by name: a shipped one's own, or that of the class.

    Raises:
        ConfigError: one cannot be made, or is no hook.
    """
    shipped = {dotted: name for name, dotted in doors.SHIPPED["hooks"].items()}
    made = []
    for where, node in doors.nodes_of("hooks", config.hooks):
        hook = instantiate(where, node)
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"{where}._target_={node['_target_']} gave a {type(hook).__name__}, not a gatrain.Hook. "
                "Subclass gatrain.Hook."
            )
        made.append((shipped.get(node["_target_"], node["_target_"].rpartition(".")[2]), hook))
    return named(made)


def build_loggers(config: RunConfig) -> list[Sink]:
    """Make the loggers of a run beside metrics.jsonl, which needs no word of the configuration. For rank 0.

    Raises:
        ConfigError: one cannot be made, or is no logger.
    """
    made = []
    for where, node in doors.nodes_of("logger", config.logger):
        if node["_target_"] == doors.SHIPPED["logger"]["jsonl"]:
            continue
        logger = instantiate(where, node)
        if logger is None:  # a shipped one that is not installed, and was not asked for by name
            continue
        if not isinstance(logger, Sink):
            raise ConfigError(
                f"{where}._target_={node['_target_']} gave a {type(logger).__name__}, not a gatrain.Logger. "
                "Subclass gatrain.Logger."
            )
        made.append(logger)
    return made


def build_knobs(config: RunConfig) -> Knobs:
    """Make the knobs that the configuration names.

    Raises:
        ConfigError: one cannot be made, or is no knob.
    """
    return by_name(
        [(where, instantiate(where, node)) for where, node in doors.nodes_of("knobs", config.knobs)]
    )


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


def build_strategy(config: RunConfig) -> GradientStrategy:
    """Make the way from a window to its gradient: that of ``gradient``, or the one that the optimizer or ``norm``
    asks for.

    Raises:
        ConfigError: ``gradient`` names something else, or does not go with the rest of the configuration.
    """
    wanted, given = config.optimizer.gradient, config.gradient
    if wanted is not None:
        asked = doors.node_of("gradient", given)["_target_"]
        shipped = doors.SHIPPED["gradient"]
        if asked not in (shipped["plain"], shipped[wanted]):
            raise ConfigError(
                f"optimizer={config.optimizer.name} takes gradients as gradient={wanted} gives them, and gradient="
                f"{given!r} is another way. Leave gradient out, or use optimizer=adamw."
            )
        given = given if asked == shipped[wanted] else wanted
    made: GradientStrategy = _part_of("gradient", given, GradientStrategy)  # type: ignore[type-abstract]
    of_norm = build_norm(config).strategy()
    if of_norm is not None:
        if type(made) is not Plain:
            raise ConfigError(
                f"norm={config.norm} computes gradients in a way of its own, and gradient={given!r} is another. "
                "Leave one of the two out."
            )
        made = of_norm
    made.check(config)
    if config.compile == REDUCE_OVERHEAD and type(made) is not Plain:
        raise ConfigError(
            f"compile={REDUCE_OVERHEAD} replays a forward and the backward that follows it, and "
            f"{type(made).__name__} computes windows in another way. Use compile=true."
        )
    return made


def build_norm(config: RunConfig) -> Normalisation:
    """Make what is done about BatchNorm.

    Raises:
        ConfigError: ``norm`` names something else.
    """
    return _part_of("norm", config.norm, Normalisation)


def build_parallel(config: RunConfig) -> Replicated:
    """Make what lays the model on the ranks.

    Raises:
        ConfigError: ``parallel`` names something else.
    """
    return _part_of("parallel", config.parallel, Replicated)


def build_random(config: RunConfig) -> RandomNumbers:
    """Make the source of the forwards' random numbers.

    Raises:
        ConfigError: ``dropout`` names something else.
    """
    return _part_of("dropout", config.dropout, RandomNumbers)


def _part_of(key: str, value: Any, kind: type[T]) -> T:
    """Make a part that a door takes one of.

    Raises:
        ConfigError: it is of another kind.
    """
    made = _part(key, value)
    if not isinstance(made, kind):
        shipped = next(iter(doors.SHIPPED[key]))
        raise ConfigError(
            f"{key}={doors.node_of(key, value)['_target_']} gave a {type(made).__name__}, not a "
            f"{kind.__module__}.{kind.__name__}. Subclass {kind.__name__}, or write {key}={shipped}."
        )
    return made


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


def _make_own_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool | None
) -> torch.optim.Optimizer:
    assert config.node is not None
    dotted, target = config.node["_target_"], targets.admit("optimizer", config.node)
    if isinstance(target, type) and issubclass(target, torch.optim.Optimizer):
        check_step(target)
    takes = believed_parameters(target) or {}
    is_open = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    names = [name for name, each in takes.items() if each.kind is not each.VAR_KEYWORD]
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
    if "weight_decay" not in names and not is_open:
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    given[first] = groups
    if fused and "fused" in names and not {"fused", "foreach"} & config.node.keys():
        with contextlib.suppress(ConfigError):  # not for this class, device or combination of options
            return _as_optimizer(dotted, instantiate("optimizer", config.node, **given, fused=True))
    return _as_optimizer(dotted, instantiate("optimizer", config.node, **given))


def _as_optimizer(dotted: str, made: Any) -> torch.optim.Optimizer:
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer._target_={dotted} gave a {type(made).__name__}, not a torch.optim.Optimizer."
        )
    return made


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
    if isinstance(target, type) and issubclass(target, torch.optim.lr_scheduler.LRScheduler):
        check_schedule_class(target)
        own = _torch_schedule(config, node, given)
    elif not isinstance(target, type) and "step" in takes:
        of_step = instantiate("schedule", {**node, "_partial_": True}, **given)
        own = lambda step: float(of_step(step=step))  # noqa: E731
    else:
        own = instantiate("schedule", node, **given)
        if not callable(own):
            raise ConfigError(
                f"schedule._target_={dotted} gave a {type(own).__name__}, not a function of the optimizer step. "
                "Give it __call__(self, step), or name a function with the argument 'step'."
            )
    return dataclasses.replace(clock, own=check_factor(own, total_steps, f"schedule._target_={dotted}"))


def _torch_schedule(config: RunConfig, node: dict[str, Any], given: dict[str, Any]) -> Factor:
    if "epochs" in node:
        given = {}
    if config.optimizer.lr is None:
        raise ConfigError(f"{node['_target_']} needs the peak rate. Give it optimizer.lr=....")
    return TorchFactor(
        lambda dummy: instantiate("schedule", node, optimizer=dummy, **given), config.optimizer.lr
    )


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
        name: value(f"{path}.{name}", node[name]) for name in _keywords(node) if name not in given
    } | given
    try:
        return partial(target, *positional, **named) if partial_ else target(*positional, **named)
    except GatrainError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and re.search("unexpected keyword|required .*argument", str(error)):
            _explain_keywords(path, node, target, set(given))
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


def _explain_keywords(path: str, node: dict[str, Any], target: Callable[..., Any], extra: set[str]) -> None:
    """After a call failed with a TypeError: say it better where the target's own words show a wrong keyword.

    Raises:
        ConfigError: they do.
    """
    parameters = believed_parameters(target)
    if parameters is None or node.get("_args_") or node.get("_partial_"):
        return
    if text := mistake(path, node["_target_"], parameters, set(_keywords(node)), extra):
        raise ConfigError(text)


def _keywords(node: dict[str, Any]) -> list[str]:
    return [
        name for name in node if name not in ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
    ]
