"""How much a YAML file may say: aliases of aliases multiply, and nesting ends Python's stack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

MOST_BYTES = 2**24
MOST_NODES = 100_000
"""Values of a file, those counted again for which an alias stands."""
MOST_DEPTH = 64


class TooMuchError(yaml.YAMLError):  # type: ignore[misc]
    """The file is larger, deeper or more repetitive than any configuration."""


def check(path: Path) -> None:
    """Look at a file before it is loaded.

    Raises:
        TooMuchError: it would take too much memory, or too deep a stack.
        yaml.YAMLError: it is not valid YAML.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with path.open("rb") as file:
        if len(text := file.read(MOST_BYTES + 1)) > MOST_BYTES:
            raise TooMuchError(f"it is larger than {MOST_BYTES} bytes")
    sizes: dict[str, int] = {}
    open_: list[_Node] = [_Node(None)]
    for event in yaml.parse(text.decode("utf-8"), Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append(_Node(event.anchor))
            if len(open_) > MOST_DEPTH:
                raise TooMuchError(f"it is nested more than {MOST_DEPTH} deep")
            continue
        size = 0
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = open_.pop()
            size = closed.size
            if closed.anchor:
                sizes[closed.anchor] = size
        open_[-1].size += size
        if open_[-1].size > MOST_NODES:
            raise TooMuchError(f"it stands for more than {MOST_NODES} values")


@dataclass
class _Node:
    anchor: str | None
    size: int = 1
