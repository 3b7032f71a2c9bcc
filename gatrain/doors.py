"""The doors: the parts of a run that people bring themselves, each by a short name or a `_target_`.

A recipe names a part in one of three ways, which mean the same wherever a door stands::

    hooks: [ema]                                    # a shipped part, with its defaults
    hooks: [{name: ema, decay: 0.99}]               # a shipped part, with values
    hooks: [{_target_: my_module.Sharpness, k: 3}]  # the user's own

`gatrain.build.instantiate` makes the object of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatrain.errors import ConfigError, nearest

SHIPPED: dict[str, dict[str, str]] = {
    "scheduler": {
        "auto": "gatrain.launch.schedulers.Auto",
        "slurm": "gatrain.launch.schedulers.slurm.Slurm",
    },
    "hooks": {
        "ema": "gatrain.hooks.ema.EMA",
        "early_stopping": "gatrain.hooks.early_stopping.EarlyStopping",
        "keep_best": "gatrain.hooks.keep_best.KeepBest",
        "sample_grid": "gatrain.hooks.sample_grid.SampleGrid",
        "noise_scale": "gatrain.hooks.noise_scale.NoiseScale",
    },
    "logger": {
        "auto": "gatrain.report.tensorboard.where_installed",
        "jsonl": "gatrain.report.jsonl.JsonlSink",
        "tensorboard": "gatrain.report.tensorboard.TensorBoardSink",
        "wandb": "gatrain.report.wandb.WandbLogger",
        "mlflow": "gatrain.report.mlflow.MLflowLogger",
    },
    "knobs": {"attention": "gatrain.train.attention.AttentionBackend"},
    "order": {
        "shuffle": "gatrain.train.order.shuffle.Shuffle",
        "sequential": "gatrain.train.order.sequential.Sequential",
        "weighted": "gatrain.train.order.weighted.Weighted",
        "grouped": "gatrain.train.order.grouped.Grouped",
    },
    "gradient": {
        "plain": "gatrain.train.gradient.plain.Plain",
        "cached": "gatrain.train.gradient.cached.Cached",
        "fold": "gatrain.train.gradient.fold.Fold",
        "in_backward": "gatrain.train.gradient.in_backward.InBackward",
        "bf16_stochastic": "gatrain.train.gradient.bf16_sums.Stochastic",
        "bf16_kahan": "gatrain.train.gradient.bf16_sums.Kahan",
        "phases": "gatrain.train.gradient.phases.Phases",
    },
    "norm": {
        "keep": "gatrain.train.norm.keep.Keep",
        "torch": "gatrain.train.norm.keep.Torch",
        "exact": "gatrain.train.norm.exact.Exact",
        "group": "gatrain.train.norm.convert.Group",
        "layer": "gatrain.train.norm.convert.Layer",
        "instance": "gatrain.train.norm.convert.Instance",
        "frozen": "gatrain.train.norm.convert.Frozen",
        "sync": "gatrain.train.norm.convert.Sync",
    },
    "dropout": {
        "torch": "gatrain.train.dropout.RandomNumbers",
        "keyed": "gatrain.train.dropout.keyed.KeyedDropout",
    },
    "parallel": {"replicated": "gatrain.train.parallel.Replicated"},
}
"""For each door, by its configuration key: the short names with what they stand for."""

LISTS = ("hooks", "logger", "knobs")
"""Doors that take any number of parts."""

AS_WRITTEN = {SHIPPED["norm"]["exact"]}
"""Parts that step into the forward, which is then neither compiled nor recomputed: ``auto`` means no."""

GIVEN: dict[str, set[str]] = {
    "order": {"data", "seed", "effective_batch"},
    "optimizer": {"params", "lr", "weight_decay", "fused"},
    "schedule": {"optimizer", "step", "total_steps", "effective_batch"},
}
"""For each door: keywords that gatrain adds, those of them that the part takes."""


def is_shipped(dotted: str) -> bool:
    """Whether a dotted name is that of a shipped part."""
    return any(dotted in parts.values() for parts in SHIPPED.values())


def node_of(key: str, value: Any, where: str = "") -> dict[str, Any]:
    """The node with a ``_target_`` that a recipe's value stands for.

    Args:
        key: the door.
        value: a short name, or a mapping with ``name`` or ``_target_``.
        where: the value's place in the configuration, for messages; the door's key by default.

    Raises:
        ConfigError: it names no part, or a part that is not shipped.
    """
    where = where or key
    shipped = SHIPPED[key]
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or ("name" in value) == ("_target_" in value):
        raise ConfigError(
            f"{where}={value!r} names no part. Write a name ({', '.join(shipped)}), a mapping with name and its "
            "values, or a mapping with the _target_ of your own."
        )
    node = dict(value)
    if "name" in node:
        name = node.pop("name")
        if name not in shipped:
            only = f"'{next(iter(shipped))}', the only one that is shipped"
            allowed = f"one of {', '.join(shipped)}" if len(shipped) > 1 else only
            mine = "{_target_: my_module.MyClass}"
            raise ConfigError(
                f"{where}={name} is not {allowed}.{nearest(str(name), tuple(shipped))} One of your own goes by its "
                f"class: '{key}={f'[{mine}]' if key in LISTS else mine}'."
            )
        node = {"_target_": shipped[name], **node}
    return node


def nodes_of(key: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """Each part of a door with its place in the configuration: its node (`node_of`). One part needs no list.

    Raises:
        ConfigError: it is no list, or an item names no part.
    """
    if values is None:
        return []
    if isinstance(values, str | Mapping) or key not in LISTS:
        return [(key, node_of(key, values))]
    if not isinstance(values, list | tuple):
        raise ConfigError(
            f"{key}={values!r} is not a list. Write for example {key}=[{next(iter(SHIPPED[key]))}]."
        )
    return [(f"{key}[{nth}]", node_of(key, value, f"{key}[{nth}]")) for nth, value in enumerate(values)]
