"""The typed schema as Hydra needs it and as people read it. Its fields are those of `gatrain.config`."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from gatrain.config import OPTIMIZERS as OPTIMIZERS
from gatrain.config import RunConfig, ScheduleConfig

OPTIMIZER_SCHEMAS = {f"optimizer/base_{name}" for name in OPTIMIZERS}


def register(optimizer_by_group: bool) -> None:
    """Store the schema under the names that recipes use.

    The optimizer's class comes from the chosen group option (``conf/optimizer/sgd.yaml`` lists ``base_sgd``),
    so the root schema must then leave it open: one structured class cannot be merged over another. A recipe
    that chooses no option gets AdamW.

    Args:
        optimizer_by_group: whether the recipe chooses an option of the group ``optimizer``.
    """
    store = ConfigStore.instance()
    root = thawed(RunConfig())
    # What is no key of theirs may be an argument of the user's own `_target_`, or left over from another optimizer
    # that `optimizer=` on the command line took the place of: `gatrain.compose.own` tells, and refuses mistakes.
    OmegaConf.set_struct(root.optimizer, False)
    OmegaConf.set_struct(root.schedule, False)
    if optimizer_by_group:
        root.optimizer = MISSING
    store.store("schema", root)
    for name, cls in OPTIMIZERS.items():
        node = thawed(cls())
        OmegaConf.set_struct(node, False)
        store.store(f"base_{name}", node, group="optimizer")
    schedule = thawed(ScheduleConfig())
    OmegaConf.set_struct(schedule, False)
    store.store("base_schedule", schedule, group="schedule")


def thawed(instance: Any) -> DictConfig:
    """Return the schema of a frozen dataclass without the read-only flag, which would refuse overrides."""
    schema = OmegaConf.structured(instance)

    def thaw(node: Any) -> None:
        OmegaConf.set_readonly(node, None)
        if isinstance(node, DictConfig):
            for key in node:
                if OmegaConf.is_config(node[key]):
                    thaw(node[key])

    thaw(schema)
    assert isinstance(schema, DictConfig)
    return schema


def dotted_keys() -> list[str]:
    """Every key of the schema, those of all optimizers included."""
    keys: list[str] = []

    def walk(cls: type[Any], prefix: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            keys.append(prefix + name)
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]

    walk(RunConfig, "")
    for cls in OPTIMIZERS.values():
        walk(cls, "optimizer.")
    return list(dict.fromkeys(keys))


def hint_of(full_key: str) -> Any:
    """Return the declared type of a dotted key, or None in an open node."""
    names = re.sub(r"\[\d+\]", "", full_key).split(".")
    candidates: list[Any] = [RunConfig]
    for name in names:
        if _OPTIMIZER in candidates:
            candidates = [*OPTIMIZERS.values()]
        found = []
        for cls in candidates:
            hint = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
            found += [hint] if hint is not None and hint not in found else []
        candidates = found
    if not candidates or candidates[0] is Any:
        return None
    is_element = full_key.endswith("]") and typing.get_origin(candidates[0]) is tuple
    return typing.get_args(candidates[0])[0] if is_element else candidates[0]


_OPTIMIZER = typing.get_type_hints(RunConfig)["optimizer"]
