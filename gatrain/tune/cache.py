"""Measured curves that outlive a run: one file for each fingerprint of everything they depend on.

The effective batch is not part of it: a curve answers for every effective batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.machinery
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import RunFolderError
from gatrain.plan import StepSettings
from gatrain.rundir import read_json, write_json
from gatrain.tune.confirm import Confirmation
from gatrain.tune.curve import Curve
from gatrain.tune.estimate import DataInfo
from gatrain.tune.hardware import Hardware

VERSION = 1
"""Of the file's form and of the way of measuring: raise it when old measurements should not count."""
MAX_SOURCE_FILES = 200
MAX_CONFIRMATIONS = 50
"""The newest interleaved runs that a file keeps."""
TRAINING = "gatrain.train.engine"
"""What trials time, whatever the user's own targets are."""


def cache_dir() -> Path:
    """``$GATRAIN_CACHE``, else ``$XDG_CACHE_HOME/gatrain``, else ``~/.cache/gatrain``."""
    if own := os.environ.get("GATRAIN_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gatrain"


def fingerprint(
    config: RunConfig, info: DataInfo, hardware: Hardware, world_size: int, cwd: Path | None = None
) -> str:
    """Hash everything that a measurement depends on, apart from the effective batch.

    The model's and data's nodes with the source text of the modules that they name, the data, the kind of
    optimizer, what was asked of precision, checkpointing, compile and sync, the hardware with its software,
    and the world size. Learning rates and step counts change no time and are left out. Only the hash is
    kept, since the nodes may hold secrets.
    """
    optimizer = config.optimizer
    nodes = {key: getattr(config, key) for key in ("model", "data", "loss", "task")}
    parts = {
        "version": VERSION,
        "nodes": nodes,
        "sources": {target: source_hash(target, cwd) for target in sorted({TRAINING, *targets(nodes)})},
        "data": info.fingerprint,
        "parameters": [info.parameters, info.parameter_bytes],
        "optimizer": [
            optimizer.name,
            bool(getattr(optimizer, "momentum", 0.0)),
            bool(getattr(optimizer, "nesterov", False)),
            optimizer.clip_norm is not None,
        ],
        "asked": [config.precision, config.checkpointing, config.compile, config.sync],
        "memory_fraction": config.tune.memory_fraction,
        "hardware": hardware.fingerprint(),
        "world_size": world_size,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` inside nested configuration nodes."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


def source_hash(target: str, cwd: Path | None = None) -> str:
    """Hash the source that ``target`` names, found on the path without importing anything.

    Of the user's own work the whole package counts, or the module's file and those beside it that the name of
    an import may reach; of an installed package the one file, for its version is in that text often enough.
    """
    names = target.split(".")
    search = [str(cwd or Path.cwd()), *sys.path]
    with contextlib.suppress(ImportError, ValueError, OSError, AttributeError):
        spec = importlib.machinery.PathFinder.find_spec(names[0], search)
        if spec is None or spec.origin is None:
            return "not found"
        origin = Path(spec.origin)
        if origin.name != "__init__.py":
            return _hash_files(_siblings(origin))
        if names[0] == "gatrain":  # the part that is named; `TRAINING` stands for how it is used
            return _hash_files(sorted(_deepest_file(origin, names[1:]).parent.glob("*.py")))
        if not _is_installed(origin):
            return _hash_files(sorted(origin.parent.rglob("*.py"))[:MAX_SOURCE_FILES])
        return _hash_files([_deepest_file(origin, names[1:])])
    return "not found"


def _siblings(origin: Path) -> list[Path]:
    if _is_installed(origin):
        return [origin]
    return [origin, *sorted(path for path in origin.parent.glob("*.py") if path != origin)[:MAX_SOURCE_FILES]]


def _is_installed(origin: Path) -> bool:
    """Installed packages do not change under the user's hands; Python's own library neither."""
    return any(part in ("site-packages", "dist-packages", "lib-dynload") for part in origin.parts)


def _deepest_file(origin: Path, names: Iterable[str]) -> Path:
    """Follow ``a.b.c`` from a package's folder to the last file or package that exists."""
    deepest, folder = origin, origin.parent
    for name in names:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
        if not (folder / name / "__init__.py").is_file():
            break
        folder = folder / name
        deepest = folder / "__init__.py"
    return deepest


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plan_file(key: str) -> Path:
    """Where the curves with this fingerprint are kept."""
    return cache_dir() / "plans" / f"{key}.json"


def load_curves(key: str) -> dict[StepSettings, Curve]:
    """Curves stored under this fingerprint; empty where there are none or the file is damaged."""
    try:
        curves = [Curve.from_dict(curve) for curve in _stored(key)["curves"]]
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {curve.settings: curve for curve in curves}


def load_confirmations(key: str) -> list[Confirmation]:
    """Whole steps stored with those curves, oldest first, each for one effective batch and world size."""
    try:
        return [Confirmation.from_dict(each) for each in _stored(key)["confirmations"]]
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _stored(key: str) -> dict[str, Any]:
    stored = read_json(plan_file(key))
    return stored if stored.get("version") == VERSION else {}


def store_curves(
    key: str, curves: dict[StepSettings, Curve], confirmations: Sequence[Confirmation] = ()
) -> str | None:
    """Keep the curves, atomically. Returns what went wrong, or None: a full disk must not stop a training."""
    kept = [dataclasses.asdict(curve) for curve in curves.values() if curve.measurements]
    if not kept:
        return None
    whole = [dataclasses.asdict(each) for each in confirmations[-MAX_CONFIRMATIONS:]]
    try:
        write_json(plan_file(key), {"version": VERSION, "curves": kept, "confirmations": whole})
    except OSError as error:
        return f"the measurements could not be kept in {plan_file(key)}: {error}"
    return None
