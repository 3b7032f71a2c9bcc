"""Measured curves that outlive a run: one file for each fingerprint of everything they depend on.

The effective batch is not part of it: a curve answers for every effective batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain import codec
from gatrain.assets import cache_dir
from gatrain.config import RunConfig
from gatrain.dependencies import source_hash, targets
from gatrain.errors import RunFolderError
from gatrain.hardware import Hardware
from gatrain.plan import StepSettings
from gatrain.rundir import read_json, write_json
from gatrain.tune.curve import Curve
from gatrain.tune.estimate import DataInfo
from gatrain.tune.finalists import Confirmation

VERSION = 3
"""Of the file's form and of the way of measuring: raise it when old measurements should not count."""
MAX_CONFIRMATIONS = 50
"""The newest interleaved runs that a file keeps."""
TRAINING = "gatrain.train.engine"
"""What trials time, whatever the user's own targets are."""


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
        "parameters": [info.parameters, info.parameter_bytes, info.half_parameters],
        "optimizer": [
            optimizer.name,
            bool(getattr(optimizer, "momentum", 0.0)),
            bool(getattr(optimizer, "nesterov", False)),
            optimizer.clip_norm is not None,
        ],
        "asked": [config.precision, config.checkpointing, config.compile, config.sync],
        "memory_fraction": config.tune.memory_fraction,
        "checked": config.train.check
        == "error",  # curves of a loss that nobody checked answer nobody who asks
        "hardware": hardware.fingerprint(),
        "world_size": world_size,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan_file(key: str) -> Path:
    """Where the curves with this fingerprint are kept."""
    return cache_dir() / "plans" / f"{key}.json"


def load_curves(key: str) -> dict[StepSettings, Curve]:
    """Curves stored under this fingerprint; empty where there are none or the file is damaged."""
    try:
        curves = codec.decode(list[Curve], _stored(key)["curves"], finite=False)
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {curve.settings: curve for curve in curves}


def load_confirmations(key: str) -> list[Confirmation]:
    """Whole steps stored with those curves, oldest first, each for one effective batch and world size."""
    try:
        return codec.decode(list[Confirmation], _stored(key)["confirmations"])
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _stored(key: str) -> dict[str, Any]:
    stored = read_json(plan_file(key))
    return stored if stored.get("version") == VERSION else {}


def store_curves(
    key: str, curves: dict[StepSettings, Curve], confirmations: Sequence[Confirmation] = ()
) -> str | None:
    """Keep the curves, atomically. Returns what went wrong, or None: a full disk must not stop a training."""
    kept = [codec.encode(curve) for curve in curves.values() if curve.measurements]
    if not kept:
        return None
    whole = codec.encode(confirmations[-MAX_CONFIRMATIONS:])
    try:
        write_json(plan_file(key), {"version": VERSION, "curves": kept, "confirmations": whole})
    except OSError as error:
        return f"the measurements could not be kept in {plan_file(key)}: {error}"
    return None
