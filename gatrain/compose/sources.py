"""Who set each value: the files of a composition in the order of merging, and the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from gatrain.compose import COMMAND_LINE, DEFAULT, words

_NUMBER_ALIKE = re.compile(r"[-+.]?\d.*|[-+]?inf|nan|true|false", re.IGNORECASE)
"""What a text looks like that was a number or a truth value before."""


@dataclass(frozen=True)
class Part:
    """One file of a composition."""

    element: ResultDefault
    path: Path
    leaves: dict[str, Any]
    """Dotted key of the whole configuration -> value in this file."""


def stem(element: ResultDefault) -> str:
    """The element's file below a folder of the search path, without its ending."""
    return (element.config_path or "").removesuffix(".yaml")


def leaves_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves_of(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node


def parts_of(
    elements: Sequence[ResultDefault], folders: Sequence[Path], read: Callable[[Path], DictConfig]
) -> list[Part]:
    """The files behind the elements of a defaults list; those of the schema have none."""
    found = []
    for element in elements:
        name = f"{stem(element)}.yaml"
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            continue
        content = OmegaConf.to_container(read(path))
        assert isinstance(content, dict)
        content.pop("defaults", None)
        found.append(Part(element, path, dict(leaves_of(content, element.package or ""))))
    return found


def is_below(known: str, key: str) -> bool:
    """Whether ``key`` is ``known`` or below it."""
    return key == known or key.startswith(f"{known}.")


def sources_of(
    leaves: Mapping[str, Any], parts: Sequence[Part], parsed: Sequence[Override]
) -> dict[str, str]:
    """Tell for each leaf who set it last, replaying the merge order of the defaults list."""
    sources = dict.fromkeys(leaves, DEFAULT)
    for part in parts:
        sources |= {key: str(part.path) for key in part.leaves if key in sources}
    for override in parsed:
        for key in leaves:
            if is_below(override.key_or_group, key):
                chooses_file = sources[key] != DEFAULT and _is_group(override, parts)
                sources[key] = sources[key] if chooses_file else COMMAND_LINE
    return sources


def _is_group(override: Override, parts: Sequence[Part]) -> bool:
    return any(stem(part.element).startswith(f"{override.key_or_group}/") for part in parts)


# --- names that look like numbers -----------------------------------------------------------------------


def keep_text(
    composed: DictConfig,
    leaves: Mapping[str, Any],
    sources: Mapping[str, str],
    parts: Sequence[Part],
    parsed: Sequence[Override],
    cwd: Path,
) -> dict[str, Any]:
    """Put back what Hydra and YAML read as numbers where the key takes text; return what changed."""
    for file in parts:
        words.check_file(file.path, file.element.package or "", leaves, cwd)
    raw: dict[str, str] = {}
    for override in parsed:
        if not isinstance(override._value, QuotedString):
            raw[override.key_or_group] = (override.input_line or "").partition("=")[2].strip()
    changed = {}
    for key, value in leaves.items():
        if key.endswith("._target_") or not _may_be_a_number(value):
            continue
        if sources.get(key) == COMMAND_LINE:
            written = raw.get(key)
        else:
            part = next((part for part in reversed(parts) if str(part.path) == sources.get(key)), None)
            written = _written(part, key) if part is not None else None
        meant = value if written is None else words.kept(written, _as_read(value, written), key, leaves, cwd)
        if meant != value or type(meant) is not type(value):
            OmegaConf.update(composed, key, meant)
            changed[key] = meant
    return changed


def _may_be_a_number(value: Any) -> bool:
    """A number, or a text that was made of one."""
    if isinstance(value, list):
        return any(_may_be_a_number(each) for each in value)
    is_alike = isinstance(value, str) and _NUMBER_ALIKE.fullmatch(value) is not None
    return is_alike or isinstance(value, bool | int | float)


def _as_read(value: Any, written: str) -> Any:
    """What YAML reads, of a value that the schema may have turned into text again."""
    if not isinstance(value, str):
        return value
    try:
        read = OmegaConf.create(f"[{written}]")[0]
    except (yaml.YAMLError, OmegaConfBaseException, IndexError, KeyError):
        return value
    return read if isinstance(read, bool | int | float) else value


def _written(part: Part, key: str) -> str | None:
    """How a file writes the value of a key, without quotes; None for what is quoted or no single value."""
    names = (
        key.removeprefix(f"{part.element.package}.").split(".") if part.element.package else key.split(".")
    )
    node: Any = yaml.compose(part.path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
    for name in names:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for each, value in node.value if each.value == name), None)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return ",".join(each.value for each in node.value)
    return node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None


# --- what a file says in vain ---------------------------------------------------------------------------


def remarks(parts: Sequence[Part], sources: Mapping[str, str], folders: Sequence[Path]) -> list[str]:
    """What a person should know of the files: keys without effect, and files that replace gatrain's own."""
    found = []
    parents = {stem(part.element): part.element.parent or "" for part in parts}
    for part in parts:
        lost: dict[str, Path] = {}
        for key, value in part.leaves.items():
            winner = next(other for other in reversed(parts) if key in other.leaves)
            is_lost = winner.leaves[key] != value and sources.get(key) == str(winner.path)
            if is_lost and _is_below(winner, part, parents):
                lost[key] = winner.path
        if lost:
            winners = _listed(list(dict.fromkeys(map(str, lost.values()))))
            found.append(
                f"{part.path}: {_listed(list(lost))} {'has' if len(lost) == 1 else 'have'} no effect: "
                f"{winners} after _self_ in its defaults list sets the same. Put _self_ last in that list."
            )
    for part in parts:
        name = f"{stem(part.element)}.yaml"
        hidden = [folder / name for folder in folders if (folder / name).is_file()]
        if len(hidden) > 1 and hidden[0] == part.path and not part.element.primary:
            found.append(f"{part.path} is used in place of gatrain's own {hidden[-1]}.")
    return found


def _is_below(part: Part, other: Part, parents: Mapping[str, str]) -> bool:
    """Whether ``part`` is there because of the defaults list of ``other``."""
    name, wanted, seen = part.element.parent or "", stem(other.element), set[str]()
    while name and name not in seen:
        if name == wanted:
            return True
        seen.add(name)
        name = parents.get(name, "")
    return False


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more
