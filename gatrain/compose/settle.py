"""What a configuration asks of the environment or the clock is asked once, and kept as what it came to.

A reference to another key (``${data.context}``) stays one: it says the same wherever it is read. So does one to a
secret (``${oc.env:HF_TOKEN}``), which is asked anew each time and never written down.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gatrain.secrets import note, redact_value

_NAME = re.compile(r"[\w.-]+")
_PASSING = ("${now:",)
"""Comes to something else each time it is asked, and is meant to."""


def settle(config: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """Return a copy in which references to the outside are replaced by their values.

    Returns:
        the copy, and the references that were replaced, by dotted key.

    Raises:
        OmegaConfBaseException: a reference cannot be resolved.
    """
    settled = copy.deepcopy(config)
    _thaw(settled)
    asked = [(key, node, name, text) for key, node, name, text in _references(settled) if _asks(text)]
    values = {key: _value(config, key) for key, _, _, _ in asked}
    secrets = [str(values[key]) for key, _, _, text in asked if _is_secret(key, text, values[key])]
    for secret in secrets:
        note("secret", secret)  # whatever its key is called
    references: dict[str, str] = {}
    for key, node, name, text in asked:
        value = values[key]
        if any(secret == str(value) or (len(secret) >= 6 and secret in str(value)) for secret in secrets):
            continue
        references[key] = text
        node[name] = _literal(value)
    return settled, references


def resolve_again(config: DictConfig, references: Mapping[str, str]) -> dict[str, Any]:
    """What references come to now, by dotted key. What cannot be resolved any more is left out, and so is what
    comes to something else each time."""
    found: dict[str, Any] = {}
    for key, text in references.items():
        if any(word in text for word in _PASSING):
            continue
        asking = copy.deepcopy(config)
        _thaw(asking)
        try:
            OmegaConf.update(asking, key, text, merge=False)
            found[key] = _literal(_value(asking, key))
        except OmegaConfBaseException:
            continue
    return found


def _asks(text: str) -> bool:
    """Whether a text refers to more than another key."""
    return re.search(r"\$\{[^{}]*:|\$\{[^{}]*\$\{", text) is not None


def _is_secret(key: str, text: str, value: Any) -> bool:
    """By the name of the key, the names inside the reference, or the look of the value."""
    return any(
        redact_value(name, each) != each for name in (key, *_NAME.findall(text)) for each in ("text", value)
    )


def _value(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key, throw_on_missing=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _literal(value: Any) -> Any:
    """A text that holds ``${`` is meant as it is."""
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _references(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, container, name inside it, text) of every value that refers to something."""
    if isinstance(node, DictConfig):
        names: list[Any] = list(node) if not (node._is_none() or node._is_missing()) else []
    elif isinstance(node, ListConfig):
        names = list(range(len(node))) if not (node._is_none() or node._is_missing()) else []
    else:
        return
    for name in names:
        key = f"{prefix}.{name}" if prefix else str(name)
        child = node._get_node(name)
        if child is not None and child._is_interpolation():
            yield key, node, name, str(child._value())
        else:
            yield from _references(child, key)


def _thaw(node: Any) -> None:
    if isinstance(node, DictConfig | ListConfig):
        OmegaConf.set_readonly(node, False)
        if isinstance(node, DictConfig):
            OmegaConf.set_struct(node, False)
        if node._is_none() or node._is_missing() or node._is_interpolation():
            return
        for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
            _thaw(node._get_node(name))
