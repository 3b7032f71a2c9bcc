"""What a look at a run's model and data found, and the memory of such looks: one small file for each.

A look takes seconds, most of them for importing torch, and is the same again until something changes. A memory
answers only where everything that it depends on is known and unchanged:

- Where every ``_target_`` is gatrain's own, ``torch.nn``'s, ``torch.utils.data``'s or torchvision's, the answer
  follows from the configuration, the versions, and the files and folders that the configuration names.
- The user's own code may depend on anything: other modules, files that it names itself, the environment, another
  machine, the clock. The child notes the modules that were imported and the files that were read; the
  environment is part of the key; and code that was seen to ask another process or machine is not remembered at
  all. What nobody sees, such as files opened by a library in C, is bounded by time: after an hour it is looked
  at again.

What could a memory do that is out of date? It never refuses a run: whoever asks for more samples than it knows of
looks again. The workers read data and model anew. Only a plan may be answered for a model or dataset that has
become larger within that hour, and then it is the run's first step that fails for want of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
import time
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gatrain import __version__, trust
from gatrain.assets import cache_dir
from gatrain.config import RunConfig
from gatrain.data.report import DataRecord
from gatrain.dependencies import State, file_state, hash_files, named_state, source_hash, targets
from gatrain.errors import RunFolderError
from gatrain.rundir import drop_oldest, read_json, write_text

VERSION = 2
"""Of the file's form and of the way of looking: raise it when old memories should not count."""
MAX_FILES = 500
LIFETIME_S = 3600.0
"""How long an answer of the user's own code counts."""
NODES = ("model", "data", "loss", "task")

_KNOWN_CODE = ("gatrain.", "torch.nn.", "torch.utils.data.", "torchvision.")
"""Reads nothing but what its arguments name."""
_LOOKS = (
    "build.py", "construction.py", "signatures.py", "dependencies.py", "facts.py", "inspection.py",
    "train/checkpointing.py", "train/modules.py", "train/main_gradients.py", "train/data_look.py",
    "train/sample_prints.py", "train/samples.py",
    "data/*.py", "models/*.py", "tasks/*.py",
)  # fmt: skip
"""The parts of gatrain that decide what a look finds."""
_LIBRARIES = ("torch", "torchvision", "numpy")
_PASSING = frozenset({"_", "SHLVL", "PWD", "OLDPWD", "COLUMNS", "LINES"})
"""Environment variables that differ from one command to the next and change no answer."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run's model and data before it starts."""

    samples: int
    eval_samples: int
    fingerprint: str
    """Of the training data: its source's own ``fingerprint`` if it has one, else its type and size."""
    parameters: int
    parameter_bytes: int
    checkpointing_modes: tuple[str, ...]
    """Modes of activation checkpointing that the model offers."""
    half_parameters: int = 0
    """Trained parameters of 16 bits, which get fp32 main gradients and master weights."""
    half_dtypes: str = ""
    """Their dtypes: ``bf16``, ``fp16`` or ``bf16 and fp16``."""
    batch_norms: tuple[str, ...] = ()
    """Names of the modules whose results depend on the micro-batch."""
    synchronises: bool = False
    """Whether there is SyncBatchNorm among them: all ranks need equally many micro-steps."""
    remarks: tuple[str, ...] = ()
    """Sentences on the data and the model for the plan."""
    data: DataRecord | None = None
    """What the data source has read, and a few of its samples."""
    code: tuple[str, ...] = ()
    """Files of the user's own modules that were imported."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunFacts:
        """Inverse of ``asdict``, also after JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        values = {i.name: data[i.name] for i in fields(cls) if i.default is MISSING or i.name in data}
        for name in ("checkpointing_modes", "batch_norms", "remarks", "code"):
            values[name] = tuple(values.get(name, ()))
        counts = [values[name] for name in ("samples", "eval_samples", "parameters", "parameter_bytes")]
        counts.append(values.get("half_parameters", 0))
        texts = [values["fingerprint"], values.get("half_dtypes", ""), *values["checkpointing_modes"]]
        texts += [*values["batch_norms"], *values["remarks"], *values["code"]]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("not a count")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("not a text")
        if values.get("data") is not None:
            values["data"] = DataRecord.from_dict(values["data"])
        return cls(**values)


def is_known_code(config: RunConfig) -> bool:
    """Whether nothing but the configuration and the files that it names decides what a look finds."""
    return all(target.startswith(_KNOWN_CODE) for target in targets(_nodes(config)))


def facts_key(config: RunConfig, cwd: Path) -> str | None:
    """Hash everything that a look is known to depend on before it begins; None if that cannot be told.

    Learning rates, step counts and the effective batch are no part of it. Only the hash is kept, since nodes and
    environment may hold secrets.
    """
    nodes = _nodes(config)
    package = Path(__file__).resolve().parent
    try:
        named = sorted(set(targets(nodes)))
        parts = {
            "version": VERSION,
            "nodes": nodes,
            "trust": trust.names(),
            "cwd": str(cwd),
            "gatrain": [
                __version__,
                hash_files(path for part in _LOOKS for path in sorted(package.glob(part))),
            ],
            "libraries": {
                name: _installed(name) for name in {*_LIBRARIES, *(n.split(".")[0] for n in named)}
            },
            # the default text is the standard library of this Python
            "python": [sys.version, sys.executable, sysconfig.get_paths()["stdlib"]],
            "path": os.environ.get("PYTHONPATH"),
            "sources": {target: source_hash(target, cwd) for target in named},
            "disk": named_state(nodes, cwd),
            "environment": {} if is_known_code(config) else _environment(),
        }
        text = json.dumps(parts, sort_keys=True, default=str)
    except (OSError, TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def recall(key: str, config: RunConfig, now: float | None = None) -> RunFacts | None:
    """What is remembered under this key; None where it does not count, or would refuse the run."""
    try:
        stored = read_json(_file(key))
        facts = RunFacts.from_dict(stored["facts"])
        age = (time.time() if now is None else now) - float(stored["made"])
        reads: dict[str, State] = dict(stored["reads"])
        if stored["version"] != VERSION or facts.samples < config.batch.effective:
            return None
        if not is_known_code(config) and not 0 <= age < LIFETIME_S:
            return None
        return facts if all(file_state(path) == state for path, state in reads.items()) else None
    except (RunFolderError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def keep(key: str, facts: RunFacts, reads: dict[str, State]) -> None:
    """Keep what was found, atomically; where that fails, the next one looks again.

    Args:
        key: from `facts_key`, taken before the look.
        facts: what was found.
        reads: state of the files that it also depends on.
    """
    stored = {"version": VERSION, "made": time.time(), "facts": asdict(facts), "reads": reads}
    with contextlib.suppress(OSError, ValueError):
        write_text(_file(key), json.dumps(stored) + "\n", mode=0o600)  # names of files may tell something
        drop_oldest(_file(key).parent, MAX_FILES)


def _file(key: str) -> Path:
    return cache_dir() / "facts" / f"{key}.json"


def _nodes(config: RunConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in NODES}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _PASSING}
