"""Numbers that are read in two ways: ``010`` is 8 to YAML and 10 to Python, ``1:30`` is 90 to YAML. Refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.types import QuotedString
from omegaconf._utils import get_yaml_loader

from gatrain.errors import ConfigError

_READ_TWO_WAYS = re.compile(r"[-+]?(0[\d_]*[1-9][\d_]*|\d+(:\d+)+(\.\d*)?)")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def check(raw: str, value: Any, key: str, may_be_text: bool) -> None:
    """
    Args:
        raw: as it was written, without quotes.
        value: as it was read.
        may_be_text: whether the message tells how to write a text instead.

    Raises:
        ConfigError: ``value`` is a number that others read differently.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _READ_TWO_WAYS.fullmatch(raw):
        return
    _refuse(raw, value, key, may_be_text)


def _refuse(raw: str, value: Any, key: str, may_be_text: bool) -> None:
    if ":" in raw:
        as_what = "a number" if value is None else str(value)
        raise ConfigError(
            f"{key}: {raw} is read as {as_what} by YAML and as no number by others. Write it out."
        )
    quotes = f', or "{raw}" in quotes inside of quotes for a text' if may_be_text else ""
    raise ConfigError(
        f"{key}: {raw} begins with a zero, which YAML reads as octal and others as decimal. Write "
        f"{raw.lstrip('+-0_')}{quotes}."
    )


def check_typed(key: str, value: Any, may_be_text: bool) -> None:
    """Look at what was typed for a key that takes numbers, into lists and mappings: Hydra leaves ``010`` a text,
    which becomes 10 where a number is wanted.

    Raises:
        ConfigError: a number that is read in two ways.
    """
    if isinstance(value, dict):
        for name, each in value.items():
            check_typed(key, name, False)
            check_typed(key, each, may_be_text)
    elif isinstance(value, list):
        for each in value:
            check_typed(key, each, may_be_text)
    elif isinstance(value, str) and not isinstance(value, QuotedString) and _READ_TWO_WAYS.fullmatch(value):
        _refuse(value, None, key, may_be_text)


def check_file(
    path: Path, prefix: str, takes_text: Callable[[str], bool], may_be_text: Callable[[str], bool]
) -> None:
    """Look at what `gatrain.compose.words.kept` does not see: keys of mappings, and what is in lists.

    Args:
        prefix: dotted key that the file's content is put below; empty for none.
        takes_text: whether the key takes a list of text, which is kept as it is written.

    Raises:
        ConfigError: a number that is read in two ways.
    """
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
    for key, node in _nodes(root, prefix, False):
        is_number = node.style is None and node.tag in _NUMBERS
        if is_number and _READ_TWO_WAYS.fullmatch(node.value) and not takes_text(key):
            try:
                _refuse(node.value, None, key, may_be_text(key))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None


def _nodes(node: Any, key: str, in_list: bool) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Dotted key, and a scalar that is a key of it or stands in a list of it."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode):
                yield key, name
                yield from _nodes(value, f"{key}.{name.value}" if key else name.value, in_list)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _nodes(each, key, True)
    elif isinstance(node, yaml.ScalarNode) and in_list:
        yield key, node
