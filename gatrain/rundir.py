"""Every path of a run folder, and the only ways to write there: whole files, or whole lines.

A reader never sees half a file: contents go to a temporary name in the same folder, are flushed to the disk,
and are renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatrain.errors import RunFolderError
from gatrain.plan import Plan


@dataclass(frozen=True)
class RunDir:
    """Names of everything inside one run folder; nobody else joins these strings."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        return self.path / "overrides.txt"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def hardware(self) -> Path:
        return self.path / "hardware.json"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def data(self) -> Path:
        """What was read (JSON): a `gatrain.data.report.DataRecord`."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def rank_error(self, rank: int) -> Path:
        """What a failing rank says about itself (JSON), read by the launcher."""
        return self.logs / f"error_rank_{rank}.json"

    @property
    def saved(self) -> Path:
        return self.path / "saved"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        """How the run ended (JSON), written by rank 0."""
        return self.path / "summary.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def heartbeat(self) -> Path:
        """Written again and again by node 0 of a run on several nodes, so that the others can follow it."""
        return self.path / ".heartbeat.json"

    def saved_steps(self) -> list[int]:
        """Steps that have a saved state by name, oldest first; their contents are not checked."""
        found = self.saved.glob("step_*") if self.saved.is_dir() else ()
        return sorted(int(p.name[5:]) for p in found if p.is_dir() and p.name[5:].isdigit())

    def has_run(self) -> bool:
        """Whether a run was started here."""
        return any(path.exists() for path in (self.config, self.metrics, self.saved))

    def recipe(self) -> str:
        """Name of the recipe that was started here."""
        recorded = read_json(self.env).get("recipe") if self.env.is_file() else None
        return recorded if isinstance(recorded, str) else self.path.parent.name

    def load_plan(self) -> Plan:
        """Read plan.json.

        Raises:
            RunFolderError: the file is missing or is not a plan.
        """
        return Plan.from_dict(read_json(self.plan))


def open_run_dir(path: str | os.PathLike[str]) -> RunDir:
    """Return the run folder at ``path``.

    Raises:
        RunFolderError: the folder does not exist or holds no config.yaml.
    """
    run_dir = RunDir(Path(path).expanduser().resolve())
    if not run_dir.config.is_file():
        state = "has no config.yaml" if run_dir.path.is_dir() else "does not exist"
        raise RunFolderError(
            f"{path} is not a run folder: it {state}. "
            "Give the folder that gatrain printed, such as outputs/llm/<time>."
        )
    return run_dir


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Hold the run folder for this process; the kernel lets go of it however the process ends.

    Raises:
        RunFolderError: another process holds it, or the folder cannot be written.
    """
    import fcntl  # not on every platform; commands that need no lock stay usable there

    try:
        handle = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"cannot write in {run_dir.path}: {error.strerror}.") from error
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{run_dir.path} is in use by {_holder(file.read())}. "
                "Wait until that run has ended, or choose another folder with run.dir=FOLDER."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # some network file systems cannot lock; refusing to train there would help nobody
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(text: str) -> str:
    try:
        held = json.loads(text)
        return f"process {held['pid']} on {held['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunFolderError: missing, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} does not hold a JSON object.")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a whole text file atomically and durably, with at most the permissions in ``mode``."""
    with atomic_file(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed and renamed over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode & ~_umask())
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def drop_oldest(folder: Path, most: int) -> None:
    """Remove the JSON files of a cache that were written first, beyond ``most`` of them.

    Raises:
        OSError: a file cannot be looked at or removed.
    """
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-most]:
        path.unlink(missing_ok=True)
