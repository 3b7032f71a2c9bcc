"""Plain text for `gatrain show` and `gatrain recipes`."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain.assets import Recipe
from gatrain.compose import COMMAND_LINE, DEFAULT, Composed
from gatrain.secrets import redact_value


def recipe_lines(recipes: Sequence[Recipe], columns: int = 80) -> list[str]:
    """One recipe a line with its description; tells which are the user's own."""
    if not recipes:
        return ["There is no recipe."]
    width = max(len(recipe.name) for recipe in recipes)
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
            drop_whitespace=True, break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return [*lines, "", "Start one: gatrain fit recipe=NAME"]


def config_lines(composed: Composed, columns: int = 80) -> list[str]:
    """``key = value`` with the source of each value; references such as ``${oc.env:X}`` stay references."""
    rows = [
        (key, _value(redact_value(key, value)), _source(composed.sources[key]))
        for key, value in composed.leaves.items()
    ]
    lines = [f"recipe {composed.recipe}: {composed.recipe_file}"]
    if composed.shadows is not None:
        lines.append(f"(it hides the shipped recipe {composed.shadows})")
    lines += [f"note: {remark}" for remark in composed.remarks]
    return [*lines, "", *_table(rows, columns)]


def _table(rows: Sequence[tuple[str, str, str]], columns: int) -> list[str]:
    """Keys, values and sources side by side; what is too wide goes on below, never inside of a word."""
    key_width = min(max(len(key) for key, _, _ in rows), columns // 3)
    source_width = min(max(len(source) for _, _, source in rows), columns // 3)
    value_width = min(max(len(value) for _, value, _ in rows), columns - key_width - source_width - 4)
    lines = []
    for key, value, source in rows:
        # a key or a word that is wider than its column has a line of its own
        head = [key] if len(key) <= key_width else [key, ""]
        values = textwrap.wrap(value, value_width, break_long_words=False, break_on_hyphens=False) or [""]
        if len(head) == 2:
            lines.append(head[0])
        for nth, part in enumerate(values):
            first = head[-1] if nth == 0 else ""
            last = source if nth == 0 else ""
            line = f"{first:<{key_width}}  {part:<{value_width}}"
            if last and (len(part) > value_width or len(line) + 2 + len(last) > columns):
                lines += [line.rstrip(), f"{'':<{key_width}}  <- {last}"]
            else:
                lines.append(f"{line}  {last}".rstrip())
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
