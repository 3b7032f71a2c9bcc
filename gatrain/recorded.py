"""What a run trains with, recorded when it starts: settings as they were resolved, code, precision, versions.

Whoever goes on with the run compares: the command that resumes, and rank 0 before it builds anything. A difference
that alters the result is refused, unless it is accepted by its name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gatrain import __version__, commands
from gatrain.config import OPEN_NODES
from gatrain.data.compare import data_differences
from gatrain.data.report import DataRecord
from gatrain.errors import RunFolderError, SavedStateError
from gatrain.rundir import RunDir, read_json, write_text
from gatrain.secrets import redact_value

VERSION = 1
_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers")
FREE = (
    "train.steps", "train.epochs", "train.log_every", "train.data_workers", "train.check", "train.nonfinite",
    "train.nonfinite_limit", "save", "eval", "tune", "batch.micro", "checkpointing", "compile", "sync", "knobs",
    "device", "run", "logger", "data.cache_dir", "data.broken", "scheduler",
)  # fmt: skip
"""Settings that may be another in config.yaml: how long a run trains, what it writes, how a window is computed."""
OF_THE_RUN = (
    "batch.effective",
    "batch.effective_by",
    "batch.count",
    "train.seed",
    "train.drop_last",
    "optimizer.name",
    "optimizer._target_",
    "data.samples",
)
"""What cannot be accepted: the saved state is of other windows, or of another optimizer."""
MOST_SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was recorded."""

    key: str
    """What `--accept-changes` calls it."""
    old: str
    new: str
    where: str = ""
    """Where the new value comes from."""

    @property
    def may_be_accepted(self) -> bool:
        return not any(covers(key, self.key) for key in OF_THE_RUN)

    def line(self) -> str:
        """For people."""
        return f"  {self.key}: was {self.old}, is {self.new}{f' ({self.where})' if self.where else ''}"


@dataclass(frozen=True)
class Recorded:
    """What a run trains with."""

    settings: dict[str, Any]
    """Dotted key -> value as config.yaml holds it; secrets are hidden."""
    references: dict[str, str]
    """Dotted key -> reference that was resolved to that value, such as ``${oc.env:LR}``."""
    precision: str
    code: dict[str, dict[str, str]] = field(default_factory=dict)
    """File of the user's own, relative to the working folder where it lies below it -> its hashes."""
    versions: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    """Values that were replaced by those in ``settings`` while config.yaml may not yet have been rewritten."""

    def write(self, run_dir: RunDir) -> None:
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2)
        write_text(run_dir.recorded, text + "\n", mode=0o600)


def read_recorded(run_dir: RunDir) -> Recorded | None:
    """None for a run of a version that recorded nothing.

    Raises:
        SavedStateError: the record is damaged.
    """
    if not run_dir.recorded.exists():
        return None
    try:
        stored = read_json(run_dir.recorded)
        found = Recorded(
            **{
                key: stored[key]
                for key in ("settings", "references", "precision", "code", "versions", "before")
            }
        )
        parts = (found.settings, found.references, found.code, found.versions, found.before)
        if not all(isinstance(part, dict) for part in parts) or not isinstance(found.precision, str):
            raise TypeError("not a record")
        if not all(isinstance(text, str) for text in found.references.values()):
            raise TypeError("a reference that is no text")
        if not all(
            isinstance(each, dict) and isinstance(each.get("sha256"), str) for each in found.code.values()
        ):
            raise TypeError("a file without its hash")
        return found
    except (RunFolderError, KeyError, TypeError, ValueError) as error:
        raise SavedStateError(
            f"{run_dir.recorded} is damaged, so what the run was trained with cannot be compared "
            f"({type(error).__name__}: {error}). Put it back, or delete it to go on without comparing."
        ) from error


def public(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without secrets, as they come back from JSON."""
    hidden = {key: redact_value(key, value) for key, value in leaves.items()}
    found: dict[str, Any] = json.loads(json.dumps(hidden, default=str))
    return found


def covers(known: str, key: str) -> bool:
    """Whether ``key`` is ``known`` or below it."""
    return key == known or key.startswith(f"{known}.")


# --- code -----------------------------------------------------------------------------------------------


def code_of(files: Iterable[str], cwd: Path) -> dict[str, dict[str, str]]:
    """Hashes of source files; one that cannot be read is left out."""
    found = {}
    for file in sorted(files):
        path = Path(file)
        hashes = _hashes(path)
        if hashes is not None:
            name = path.relative_to(cwd) if path.is_relative_to(cwd) else path
            found[str(name)] = hashes
    return found


def _hashes(path: Path) -> dict[str, str] | None:
    """Of the text, and of what it says to Python: comments and line breaks change only the first."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError):
        return None
    found = {"sha256": hashlib.sha256(content).hexdigest()}
    if path.suffix == ".py":
        try:
            tree = ast.dump(ast.parse(content))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return found
        found |= {
            "syntax": hashlib.sha256(tree.encode("utf-8", "surrogatepass")).hexdigest(),
            "python": _python(),
        }
    return found


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def code_differences(recorded: Recorded, cwd: Path) -> list[Difference]:
    """The files that say something else than they did when the run started."""
    found = []
    for name, before in recorded.code.items():
        now = _hashes(cwd / name)
        if now is None:
            found.append(Difference("code", f"{name} {before['sha256'][:8]}", "not there"))
            continue
        same_syntax = before.get("python") == now.get("python") and before.get("syntax") == now.get("syntax")
        if before["sha256"] != now["sha256"] and not (same_syntax and "syntax" in now):
            old, new = before["sha256"][:8], now["sha256"][:8]
            found.append(Difference("code", f"{name} with the hash {old}", new))
    return found


# --- settings -------------------------------------------------------------------------------------------


def setting_differences(
    recorded: Recorded, leaves: Mapping[str, Any], where: str = "config.yaml"
) -> list[Difference]:
    """Settings that are not those recorded, apart from those in `FREE`."""
    now = public(leaves)
    found = []
    for key in dict.fromkeys([*recorded.settings, *now]):
        if any(covers(free, key) for free in FREE):
            continue
        own = [
            name for name in ("optimizer", "schedule") if f"{name}._target_" in {**recorded.settings, **now}
        ]
        if key not in recorded.settings and not covers_any((*OPEN_NODES, *own), key):
            continue  # a setting that an earlier version did not have
        old, new = recorded.settings.get(key, _ABSENT), now.get(key, _ABSENT)
        allowed = [_plain(old), *([_plain(recorded.before[key])] if key in recorded.before else [])]
        if _plain(new) not in allowed:
            found.append(Difference(key, shown(old), shown(new), where))
    return found


def reference_differences(recorded: Recorded, now: Mapping[str, Any]) -> list[tuple[Difference, Any]]:
    """References that come to something else than they did, each with its new value."""
    found = []
    for key, value in now.items():
        old = recorded.settings.get(key, _ABSENT)
        new = public({key: value})[key]
        if (
            key in recorded.references
            and not any(covers(free, key) for free in FREE)
            and _plain(old) != _plain(new)
        ):
            found.append((Difference(key, shown(old), shown(new), recorded.references[key]), value))
    return found


def covers_any(known: Sequence[str], key: str) -> bool:
    """Whether ``key`` is one of ``known`` or below one."""
    return any(covers(each, key) for each in known)


_ABSENT = "(not set)"


def _plain(value: Any) -> str:
    """1 and 1.0 are one value; true and 1 are not."""
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    if isinstance(value, list):
        return "[" + ",".join(map(_plain, value)) + "]"
    return json.dumps(value, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """A value as a person types it."""
    text: str = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- data -----------------------------------------------------------------------------------------------


def read_data(run_dir: RunDir) -> DataRecord | None:
    """What was read when the run started; None where that was not recorded.

    Raises:
        SavedStateError: the file is damaged.
    """
    if not run_dir.data.exists():
        return None
    try:
        return DataRecord.from_dict(read_json(run_dir.data))
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SavedStateError(
            f"{run_dir.data} is damaged, so the data cannot be compared with what was trained on "
            f"({type(error).__name__}: {error}). Put it back, or delete it to go on without comparing."
        ) from error


def differences_of_data(before: DataRecord | None, now: DataRecord | None) -> list[Difference]:
    """As `gatrain.data.compare.data_differences`; nothing where one of the two is not known."""
    if before is None or now is None:
        return []
    return [Difference(key, old, new) for key, old, new in data_differences(before, now)]


# --- versions -------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, read without importing anything."""
    found: dict[str, str | None] = {"gatrain": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def version_notes(recorded: Recorded, now: Mapping[str, Any]) -> list[str]:
    """A sentence for each library that is of another version than before."""
    return [
        f"{name} is {now[name] or 'not installed'}; until here the run was trained with {before or 'none'}"
        for name, before in recorded.versions.items()
        if name in now and now[name] != before
    ]


# --- what to say ----------------------------------------------------------------------------------------


def refuse(
    run_dir: RunDir,
    differences: Sequence[Difference],
    accepted: Sequence[str] = (),
    words: Sequence[str] = (),
) -> None:
    """Do nothing where every difference is accepted.

    Args:
        accepted: names given with `--accept-changes`.
        words: what else was typed after the run folder.

    Raises:
        SavedStateError: lists every difference, and says how to go on.
    """
    open_ = [each for each in differences if not (covers_any(accepted, each.key) and each.may_be_accepted)]
    if not open_:
        return
    lines = [each.line() for each in open_[:MOST_SHOWN]]
    if len(open_) > MOST_SHOWN:
        lines.append(f"  and {len(open_) - MOST_SHOWN} more")
    fixed = list(dict.fromkeys(each.key for each in open_ if not each.may_be_accepted))
    step = f" at step {steps[-1]}" if (steps := run_dir.saved_steps()) else ""
    names = ", ".join(dict.fromkeys(each.key for each in open_[:MOST_SHOWN]))
    head = f"{run_dir.path} cannot go on{step}: not as it was when the run started: {names}"
    if fixed:
        last = f"{' and '.join(fixed)} cannot change within a run: restore what it was, or start a new run."
    else:
        keys = list(dict.fromkeys([*accepted, *(each.key for each in open_)]))
        options = [word for key in keys for word in ("--accept-changes", key)]
        command = commands.resume(run_dir, *words, *options)
        last = f"Restore what it was, or go on with what it is now: {command}"
    raise SavedStateError("\n".join([head, *lines, last]))
