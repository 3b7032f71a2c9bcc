"""A memory of compositions: one small file for each, which answers as long as nothing that was read has changed.

Importing Hydra and composing take longer than all else of a plan that is remembered. The same words in the same
folder, with the same contents of every file on the search path and the same versions, give the same configuration.
Contents are compared, not times: a few dozen small files are read in a millisecond.

Nothing private is kept: a composition that asks the environment (``${oc.env:...}``) or has a key that looks like
a secret is composed anew each time. Errors are never kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gatrain import __version__, assets
from gatrain.compose import Composed, compose, folders_of, split_recipe
from gatrain.config import RunConfig, validate
from gatrain.dependencies import source_hash, targets
from gatrain.errors import ConfigError, RunFolderError
from gatrain.rundir import drop_oldest, read_json, write_text

VERSION = 2
"""Of the file's form: raise it when old memories should not count."""
MAX_FILES = 300
MAX_ENTRIES, MAX_BYTES = 1000, 2**20
"""Entries of all folders together, and size of one file: beyond that (a recipe beside the data) nothing is kept."""

_LIBRARIES = ("hydra-core", "omegaconf", "PyYAML")
_SOURCES = ("assets.py", "config.py", "compose/*.py")
"""The parts of gatrain that decide what a composition gives."""

_CLOCK = re.compile(rb"\$\{\s*(now|python_version)\b")

Hide = Callable[[str, Any], Any]
"""Takes a dotted key and its value; returns another value where this one is a secret."""


def compose_remembered(overrides: Sequence[str], hide: Hide, cwd: Path | None = None) -> Composed:
    """As `gatrain.compose.compose`, from memory where that gives the same.

    Args:
        overrides: ``recipe=NAME`` (or a path) and Hydra override words.
        hide: tells what is secret, such as `gatrain.secrets.redact_value`.
        cwd: as for `compose`.

    Raises:
        ConfigError: anything that is wrong, in the user's words.
    """
    cwd = (cwd or Path.cwd()).resolve()
    before = _look(overrides, cwd)
    known = _recall(before) if before is not None else None
    if known is not None:
        return known
    composed = compose(overrides, cwd)
    if before is not None:
        _keep(before, composed, hide)
    return composed


@dataclass(frozen=True)
class _Look:
    """Everything that a composition depends on."""

    recipe: assets.Recipe
    cwd: Path
    given: Sequence[str]
    """The words of the command line."""
    words: list[str]
    """The same without ``recipe=``."""
    files: dict[str, bytes]
    """Path -> contents of every YAML file on the search path."""
    key: str


def _look(overrides: Sequence[str], cwd: Path) -> _Look | None:
    """None if it cannot be told: composing says what is wrong, if anything is."""
    given, words = split_recipe(overrides)
    if len(given) != 1 or importlib.util.find_spec("hydra_plugins") is not None:  # those may add search paths
        return None
    package = Path(__file__).resolve().parent.parent
    try:
        recipe = assets.find_recipe(given[0], cwd)
        folders = folders_of(recipe, cwd)
        entries, files = _read_folders(folders)
        sources = sorted(path for part in _SOURCES for path in package.glob(part))
        parts = [
            VERSION, list(overrides), str(cwd), str(recipe.path), [str(folder) for folder in folders],
            entries, _hash(files.values()),
            __version__, _hash(path.read_bytes() for path in sources),
            sys.version, [importlib.metadata.version(name) for name in _LIBRARIES],
        ]  # fmt: skip
    except (ConfigError, OSError, ValueError, RuntimeError, importlib.metadata.PackageNotFoundError):
        return None
    text = json.dumps(parts).encode("utf-8", "surrogateescape")
    return _Look(recipe, cwd, overrides, words, files, hashlib.sha256(text).hexdigest()[:32])


def _read_folders(folders: Sequence[Path]) -> tuple[list[str], dict[str, bytes]]:
    """Every folder and YAML file below ``folders`` (a new one may hide another), and the files' contents.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is too much.
    """
    entries: list[str] = []
    files: dict[str, bytes] = {}
    waiting, room = [str(folder) for folder in folders], MAX_ENTRIES
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as listing:
            found = sorted(islice(listing, room + 1), key=lambda entry: entry.name)
        entries.append(folder)
        room -= 1 + len(found)
        if room < 0:  # links that lead round in a circle end here, too
            raise ValueError("too many entries")
        for entry in found:
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.endswith(".yaml"):
                if not entry.is_file() or entry.stat().st_size > MAX_BYTES:
                    raise ValueError("no ordinary file")
                entries.append(entry.path)
                files[entry.path] = Path(entry.path).read_bytes()
    return entries, files


def _hash(contents: Any) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()


def _file(key: str) -> Path:
    return assets.cache_dir() / "composed" / f"{key}.json"


# --- what may be kept -----------------------------------------------------------------------------------


def _is_public(composed: Composed, look: _Look, hide: Hide) -> bool:
    """Whether nothing in it is secret, and files and words are all that it depends on.

    Raises:
        ConfigError: a file on the search path is damaged; it was not needed here.
    """
    from gatrain.compose.composer import read_yaml

    words = [word.lstrip("+~").partition("=")[::2] for word in look.words]
    for key, value in [*_nodes(asdict(composed.config)), *_nodes(composed.leaves), *words]:
        if _asks(key) or _asks(value) or hide(key, "text") != "text" or hide(key, value) != value:
            return False
    for path, content in look.files.items():
        # Hydra resolves what defaults lists refer to, and follows them out of the search path: nothing of either
        # is left to see in the result
        if _CLOCK.search(content):
            return False  # composition writes the time in
        if b"${" in content or b".." in content:
            listed = str(read_yaml(Path(path))._get_node("defaults"))
            if ".." in listed or _asks(listed):
                return False
    return not any(".." in value for key, value in words if "." not in key)  # such a key may choose a file


def _asks(text: Any) -> bool:
    """Whether a text refers to more than another key: ``${oc.env:HOME}``, ``${now:%Y}``."""
    return isinstance(text, str) and ":" in text.partition("${")[2]


def _nodes(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _nodes(value, key)


# --- the files ------------------------------------------------------------------------------------------


def _keep(look: _Look, composed: Composed, hide: Hide) -> None:
    """Keep it, atomically, if it may be kept and comes back the same; otherwise it is composed again next time."""
    stored = {
        "version": VERSION,
        "config": asdict(composed.config),
        "yaml": composed.yaml,
        "leaves": composed.leaves,
        "sources": composed.sources,
        "remarks": composed.remarks,
        "signatures": _signatures(composed, look.cwd),
    }
    with contextlib.suppress(OSError, TypeError, ValueError, KeyError, RuntimeError, ConfigError):
        if not _is_public(composed, look, hide):
            return
        text = json.dumps(stored)
        # JSON has no numbers as keys, no bytes and no tuples; `repr` also tells 1 from 1.0 and true
        if repr(_rebuild(look, json.loads(text))) != repr(composed):
            return
        after = _look(look.given, look.cwd)
        if after is None or after.key != look.key:  # something was edited while it was composed
            return
        write_text(_file(look.key), text + "\n", mode=0o600)  # paths and names may tell something
        drop_oldest(_file(look.key).parent, MAX_FILES)


def _signatures(composed: Composed, cwd: Path) -> dict[str, str]:
    """The source of every ``_target_``: its signature tells names from numbers."""
    nodes = {key: getattr(composed.config, key) for key in ("model", "data", "loss", "task")}
    return {target: source_hash(target, cwd) for target in targets(nodes)}


def _recall(look: _Look) -> Composed | None:
    try:
        stored = read_json(_file(look.key))
        known = _rebuild(look, stored)
        return known if stored["signatures"] == _signatures(known, look.cwd) else None
    except (RunFolderError, ConfigError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _rebuild(look: _Look, stored: dict[str, Any]) -> Composed:
    """What `_keep` was given.

    Raises:
        ConfigError, KeyError, TypeError, ValueError: it is something else.
    """
    yaml, leaves, sources = stored["yaml"], stored["leaves"], stored["sources"]
    if stored["version"] != VERSION or not isinstance(yaml, str) or not isinstance(leaves, dict):
        raise ValueError("not a composition")
    if not isinstance(sources, dict) or sources.keys() != leaves.keys():
        raise ValueError("not the sources of these keys")
    config = RunConfig.from_dict(stored["config"])
    validate(config)
    recipe = look.recipe
    remarks = [str(remark) for remark in stored["remarks"]]
    return Composed(
        config, recipe.name, recipe.path, look.words, yaml, leaves, sources, recipe.shadows, remarks
    )
