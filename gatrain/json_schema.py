"""A JSON schema of recipes, so that an editor completes keys, shows what they mean and marks what is no value."""

from __future__ import annotations

import types
import typing
from typing import Any

from gatrain import doors
from gatrain.config import OPEN_NODES
from gatrain.settings import CHOICES, Setting, settings, spelt

DRAFT = "http://json-schema.org/draft-07/schema#"
"""What editors' YAML support reads."""
REFERENCE = {"type": "string", "pattern": r"\$\{.+\}"}
"""A value may refer to another one or to the environment."""
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}


def recipe_schema() -> dict[str, Any]:
    """The schema of a file in ``recipes/``: its keys are those of `gatrain.settings`, and the user's own nodes."""
    root: dict[str, Any] = {
        "$schema": DRAFT,
        "title": "A recipe of gatrain",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "defaults": {
                "type": "array",
                "description": "Groups and files that this recipe is made of, as in Hydra.",
            },
            "hydra": {"type": "object"},
        },
    }
    for setting in settings():
        node, *parents = root, *setting.key.split(".")[:-1]
        for name in parents:
            # beside a `_target_` stand the arguments of the user's own class
            is_open = name in (*doors.SHIPPED, "optimizer", "schedule")
            made = {"type": "object", "additionalProperties": is_open, "properties": {}}
            node = node["properties"].setdefault(name, made)
        node["properties"][setting.key.rpartition(".")[2]] = _value(setting)
    return root


def _value(setting: Setting) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": setting.text} if setting.text else {}
    if setting.key in OPEN_NODES:
        return schema | {"type": ["object", "null"], "properties": {"_target_": {"type": "string"}}}
    if setting.default is not None:
        schema["default"] = spelt(setting.default) if isinstance(setting.default, tuple) else setting.default
    if setting.key in CHOICES:
        return schema | {"anyOf": [{"enum": list(CHOICES[setting.key])}, REFERENCE]}
    if setting.key == "batch.effective":
        stages = {"type": "object", "additionalProperties": {"type": "integer"}}
        return schema | {"anyOf": [{"type": "integer"}, stages, REFERENCE]}
    if setting.key in doors.SHIPPED or setting.hint is Any:
        return schema  # a name, a mapping, or a list of them
    return schema | {"anyOf": [*_of_type(setting.hint), REFERENCE]}


def _of_type(hint: Any) -> list[dict[str, Any]]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(hint) for each in _of_type(part)]
    if typing.get_origin(hint) in (tuple, list):
        return [{"type": "array"}]
    if hint is float:  # YAML 1.1, which Hydra does not read, takes 1e-3 for text, and so do some editors
        return [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"}]
    return [{"type": _TYPES[hint]}] if hint in _TYPES else [{}]
