"""From configuration to objects: the only room that calls what a `_target_` names."""

from gatrain.build.checks import check_targets
from gatrain.build.engine import build_engine, build_model, model_for_a_look
from gatrain.build.nodes import instantiate, nodes_of, parts_named
from gatrain.build.optimizer import inspect_optimizer, optimizer_maker, step_clock
from gatrain.build.parts import (
    build_hooks,
    build_knobs,
    build_loggers,
    build_norm,
    build_parallel,
    build_random,
    build_strategy,
)
from gatrain.build.task import build_task, build_task_and_source
from gatrain.build.windows import window_schedule

__all__ = [
    "build_engine",
    "build_hooks",
    "build_knobs",
    "build_loggers",
    "build_model",
    "build_norm",
    "build_parallel",
    "build_random",
    "build_strategy",
    "build_task",
    "build_task_and_source",
    "check_targets",
    "inspect_optimizer",
    "instantiate",
    "model_for_a_look",
    "nodes_of",
    "optimizer_maker",
    "parts_named",
    "step_clock",
    "window_schedule",
]
