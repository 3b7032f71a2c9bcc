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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain import __version__, codec, schema, trust
from gatrain.assets import cache_dir
from gatrain.config import RunConfig
from gatrain.errors import RunFolderError
from gatrain.hardware import Hardware
from gatrain.inspected import Inspected
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


@dataclass
class Known:
    """What one file holds."""

    version: int = VERSION
    inspected: Inspected | None = None
    """What model and data were found to be when the curves were measured."""
    curves: list[Curve] = field(default_factory=list)
    confirmations: list[Confirmation] = field(default_factory=list)
    """Full steps timed with them, oldest first."""

    def check(self) -> None:
        """
        Raises:
            ValueError: it is of another version.
        """
        schema.one_of((str(VERSION),), version=str(self.version))

    def of(self, found: Inspected) -> Known:
        """This, for a model and data as ``found``; with nothing measured where it was of others."""
        before = self.inspected
        names = ("fingerprint", "parameters", "parameter_bytes", "half_parameters", "synchronises")
        if before is None or any(getattr(before, name) != getattr(found, name) for name in names):
            return Known(inspected=found)
        return Known(VERSION, found, list(self.curves), list(self.confirmations))


def load(key: str) -> Known:
    """What is stored under this fingerprint; nothing where there is no file, or a damaged one."""
    try:
        return codec.decode(Known, read_json(plan_file(key)), finite=False)
    except (RunFolderError, ValueError):
        return Known()


def store(key: str, known: Known) -> str | None:
    """Keep it, atomically. Returns what went wrong, or None: a full disk must not stop a training."""
    curves = [curve for curve in known.curves if curve.measurements]
    if not curves:
        return None
    kept = Known(VERSION, known.inspected, curves, known.confirmations[-MAX_CONFIRMATIONS:])
    try:
        write_json(plan_file(key), codec.encode(kept), mode=0o600)  # names of files may tell something
    except OSError as error:
        return f"the measurements could not be kept in {plan_file(key)}: {error}"
    return None
