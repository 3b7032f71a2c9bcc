"""Tuning answers that outlive a run: measured curves, and the model and data that they were measured for.

One file for each fingerprint of everything that can be known without making model and data. The effective batch is
not part of it: a curve answers for every effective batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain import __version__, codec, trust
from gatrain.assets import cache_dir
from gatrain.config import RunConfig
from gatrain.errors import RunFolderError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
from gatrain.plan import StepSettings
from gatrain.rundir import read_json, write_json
from gatrain.sources import source_hash, targets
from gatrain.tune.curve import Curve
from gatrain.tune.finalists import Confirmation

VERSION = 3
"""Of the file's form and of the way of measuring: raise it when old measurements should not count."""
MAX_CONFIRMATIONS = 50
"""The newest interleaved runs that a file keeps."""
TRAINING = "gatrain.train.engine"
"""What trials time, whatever the user's own targets are."""
NOT_MEASURED = (
    "batch", "train", "schedule", "eval", "save", "tune", "run", "device", "logger", "scheduler",
)  # fmt: skip
"""Settings that change nothing that a trial measures, but for those that `fingerprint` names. Any other counts."""


def fingerprint(config: RunConfig, hardware: Hardware, world_size: int, cwd: Path | None = None) -> str:
    """Hash everything that a measurement depends on and that is known before model and data are made.

    The settings but for `NOT_MEASURED`, with the source text of the modules that they name; versions; the hardware
    with its software; the world size; and the working folder, which relative paths begin in. Of the optimizer's
    rates only whether they are zero counts: learning rates and step counts change no time. Only the hash is kept,
    since the nodes may hold secrets.
    """
    settings = {name: value for name, value in vars(config).items() if name not in NOT_MEASURED}
    settings["optimizer"] = _without_rates(codec.encode(config.optimizer))
    settings["optimizer._target_"] = config.optimizer.node
    named = sorted({TRAINING, *targets(settings)})
    parts = {
        "version": VERSION,
        "settings": settings,
        "memory_fraction": config.tune.memory_fraction,
        # curves of a loss that nobody checked answer nobody who asks
        "checked": config.train.check == "error",
        "sources": {target: source_hash(target, cwd) for target in named},
        "versions": {"python": sys.version, "gatrain": __version__}
        | {name: _version(name) for name in {target.partition(".")[0] for target in named}},
        "trust": trust.names(),
        "cwd": str(cwd or Path.cwd()),
        "hardware": hardware.fingerprint(),
        "world_size": world_size,
    }
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _without_rates(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_rates(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_rates(each) for each in value]
    return bool(value) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    return codec.encode(value) if dataclasses.is_dataclass(value) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def plan_file(key: str) -> Path:
    """Where the curves with this fingerprint are kept."""
    return cache_dir() / "plans" / f"{key}.json"


def load_inspected(key: str) -> Inspected | None:
    """What model and data were found to be when the curves with this fingerprint were measured; None where that is
    not known, or where a file that it depends on has changed since."""
    try:
        found = codec.decode(Inspected, _stored(key)["inspected"], finite=False)
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if found.is_current() else None


def load_curves(key: str, info: Inspected) -> dict[StepSettings, Curve]:
    """Curves stored under this fingerprint; empty where there are none, the file is damaged, or they are of another
    model or other data than ``info``."""
    try:
        curves = codec.decode(list[Curve], _stored_for(key, info)["curves"], finite=False)
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {curve.settings: curve for curve in curves}


def load_confirmations(key: str, info: Inspected) -> list[Confirmation]:
    """Whole steps stored with those curves, oldest first, each for one effective batch and world size."""
    try:
        return codec.decode(list[Confirmation], _stored_for(key, info)["confirmations"])
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _stored(key: str) -> dict[str, Any]:
    stored = read_json(plan_file(key))
    return stored if stored.get("version") == VERSION else {}


def _stored_for(key: str, info: Inspected) -> dict[str, Any]:
    stored, now = _stored(key), codec.encode(info)
    same = ("fingerprint", "parameters", "parameter_bytes", "half_parameters", "synchronises")
    return stored if all(stored["inspected"][name] == now[name] for name in same) else {}


def store_curves(
    key: str,
    info: Inspected,
    curves: dict[StepSettings, Curve],
    confirmations: Sequence[Confirmation] = (),
) -> str | None:
    """Keep the curves, atomically. Returns what went wrong, or None: a full disk must not stop a training."""
    kept = [codec.encode(curve) for curve in curves.values() if curve.measurements]
    if not kept:
        return None
    whole = codec.encode(confirmations[-MAX_CONFIRMATIONS:])
    stored = {"version": VERSION, "inspected": codec.encode(info), "curves": kept, "confirmations": whole}
    try:
        write_json(plan_file(key), stored, mode=0o600)  # names of files may tell something
    except OSError as error:
        return f"the measurements could not be kept in {plan_file(key)}: {error}"
    return None
