"""Every setting with its type, default and meaning, as the classes of `gatrain.config` declare them: for `--help`,
for completion and for editors. No setting is described anywhere else."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gatrain import config, doors, optimizer_config

CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": config.PRECISIONS,
    "checkpointing": config.CHECKPOINTING,
    "sync": config.SYNCS,
    "device": config.DEVICES,
    "compile": ("auto", True, False, config.REDUCE_OVERHEAD),
    "train.nonfinite": config.NONFINITE,
    "train.check": config.CHECKS,
    "batch.effective_by": config.UNITS,
    "batch.rule": config.RULES,
    "batch.count": config.COUNTS,
    "schedule.decay_shape": (None, *optimizer_config.DECAY_SHAPES),
}
"""Settings that take one of a few values."""

_TYPES = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One key of a recipe or of the command line."""

    key: str
    """Dotted, such as ``batch.effective``."""
    hint: Any
    """The declared type; `typing.Any` where several kinds of values are taken."""
    default: Any
    text: str
    """What it means: sentences, without markup."""

    @property
    def type_text(self) -> str:
        """The type or the values allowed, in words."""
        if self.key == "batch.micro":
            return "auto | whole number"
        if self.key == "batch.effective":
            return "whole number | {0: number, start: number, ...}"
        if self.key in CHOICES:
            return " | ".join(spelt(choice) for choice in CHOICES[self.key])
        if self.key in doors.SHIPPED:
            return " | ".join([*doors.SHIPPED[self.key], "{_target_: ...}"])
        return re.sub(r"\ba ", "", describe(self.hint))


@functools.cache
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of their declaration; of several optimizers' keys each once."""
    found = {each.key: each for each in _of(config.RunConfig, "")}
    for cls in config.OPTIMIZERS.values():
        for each in _of(cls, "optimizer."):
            found.setdefault(each.key, each)
    return tuple(
        sorted(found.values(), key=lambda each: each.key.partition(".")[0] if "." in each.key else "~")
    )


def _of(cls: type[Any], prefix: str) -> Iterator[Setting]:
    texts, hints = _texts()[cls.__name__], typing.get_type_hints(cls)
    for base in cls.__mro__[1:]:
        texts = _texts().get(base.__name__, {}) | texts
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _of(hint, f"{key}.")
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        yield Setting(key, hint, default, texts.get(field.name, ""))


@functools.cache
def _texts() -> dict[str, dict[str, str]]:
    """The docstring below each field, by class and field."""
    found: dict[str, dict[str, str]] = {}
    modules = config, optimizer_config
    for node in (each for module in modules for each in ast.parse(inspect.getsource(module)).body):
        if not isinstance(node, ast.ClassDef):
            continue
        texts = found.setdefault(node.name, {})
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = after.value if isinstance(after, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    texts[field.target.id] = re.sub(r"``?", "", " ".join(value.value.split()))
    return found


def describe(hint: Any) -> str:
    """Say in words what a type takes."""
    if hint is Any:
        return "a value"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return "a list of numbers" if Ellipsis in parts else f"a list of {len(parts)} numbers"
    if typing.get_origin(hint) in (list, dict):
        return "a list" if typing.get_origin(hint) is list else "a mapping"
    if dataclasses.is_dataclass(hint):
        return "keys with values: " + ", ".join(field.name for field in dataclasses.fields(hint))
    return _TYPES.get(hint, str(hint))


def spelt(value: Any) -> str:
    """A value as a recipe or the command line spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(spelt, value)) + "]"
    return str(value)
