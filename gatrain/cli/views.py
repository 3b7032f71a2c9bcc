"""Plain text for `gatrain show` and `gatrain recipes`."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain.assets import Recipe
from gatrain.compose import COMMAND_LINE, DEFAULT, Composed
from gatrain.secrets import redact_value


def recipe_lines(recipes: Sequence[Recipe]) -> list[str]:
    """One recipe a line with its description; tells which are the user's own."""
    if not recipes:
        return ["There is no recipe."]
    width = max(len(recipe.name) for recipe in recipes)
    columns = max(40, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for recipe in recipes:
        notes = []
        if recipe.yours:
            notes.append(f"yours: {_relative(str(recipe.path))}")
        if recipe.shadows is not None:
            notes.append("hides the shipped one of this name")
        note = f" [{', '.join(notes)}]" if notes else ""
        head = f"{recipe.name:<{width}}  "
        lines += textwrap.wrap(
            f"{head}{recipe.description}{note}", columns, subsequent_indent=" " * len(head),
            drop_whitespace=True, break_long_words=False,
        )  # fmt: skip
    return [*lines, "", "Start one: gatrain fit recipe=NAME"]


def config_lines(composed: Composed) -> list[str]:
    """``key = value`` with the source of each value; references such as ``${oc.env:X}`` stay references."""
    rows = [
        (key, _value(redact_value(key, value)), _source(composed.sources[key]))
        for key, value in composed.leaves.items()
    ]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))
    lines = [f"recipe {composed.recipe}: {composed.recipe_file}"]
    if composed.shadows is not None:
        lines.append(f"(it hides the shipped recipe {composed.shadows})")
    lines += [f"note: {remark}" for remark in composed.remarks]
    lines.append("")
    lines += [f"{key:<{key_width}}  {value:<{value_width}}  {source}".rstrip() for key, value, source in rows]
    return lines


def config_dict(composed: Composed) -> dict[str, Any]:
    """The same for JSON: the nested configuration, unresolved, and the source of each dotted key."""
    nested: dict[str, Any] = {}
    for key, value in composed.leaves.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = redact_value(key, value)
    return {
        "recipe": composed.recipe,
        "recipe_file": str(composed.recipe_file),
        "shadows": str(composed.shadows) if composed.shadows else None,
        "config": nested,
        "sources": composed.sources,
        "remarks": composed.remarks,
    }


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


def _source(source: str) -> str:
    return source if source in (COMMAND_LINE, DEFAULT) else _relative(source)


def _relative(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else str(Path(relative))
