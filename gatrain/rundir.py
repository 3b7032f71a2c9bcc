"""Every path of a run folder, and the only ways to write there: whole files, or whole lines.

A reader never sees half a file: contents go to a temporary name in the same folder, are flushed to the disk,
and are renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shlex
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatrain.errors import DamagedFileError, RunFolderError
from gatrain.plan import Plan
from gatrain.secrets import hide_in

MOST_JSON_BYTES = 2**28
"""Larger files are nothing that gatrain has written: a plan has kilobytes, a large model's progress megabytes."""
STATE_NAME = re.compile(r"step_([0-9]{8,})")


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
    def recorded(self) -> Path:
        """What the run trains with (JSON): a `gatrain.recorded.Recorded`, to compare with when it goes on."""
        return self.path / "recorded.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

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

    def state(self, step: int) -> Path:
        """The saved state of a step."""
        return self.saved / f"step_{step:08d}"

    @property
    def kept(self) -> Path:
        """States that a hook wanted to stay, each in a folder of its own."""
        return self.path / "kept"

    @property
    def loggers(self) -> Path:
        """The ids that trackers know the run by (JSON)."""
        return self.path / "loggers.json"

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
    def session(self) -> Path:
        """Left by node 0 of a run on several nodes as long as it runs: the others see that the folder is shared."""
        return self.path / ".session"

    def saved_steps(self) -> list[int]:
        """Steps whose saved state was finished once, oldest first; that it still is whole is not checked."""
        return [
            step
            for step, path in self.saved_entries()
            if not path.is_symlink() and (path / "manifest.json").is_file()
        ]

    def saved_entries(self) -> list[tuple[int, Path]]:
        """Everything that has the name of a saved state, damaged, empty or no folder at all; oldest first.

        Raises:
            RunFolderError: they cannot be listed.
        """
        return list_states(self.saved)

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
            RunFolderError: the file is missing or cannot be read.
            DamagedFileError: it is not a plan that can be computed.
        """
        again = f"To plan again: gatrain resume {shlex.quote(str(self.path))} batch.micro=auto"
        if not self.plan.exists():
            raise RunFolderError(f"{self.plan} is missing. {again}")
        try:
            return Plan.from_dict(read_json(self.plan))
        except ValueError as error:
            raise DamagedFileError(f"{self.plan} is not a plan: {error}. {again}") from error

    def refuse_links(self) -> None:
        """What a run writes and reads stays in its folder.

        Raises:
            RunFolderError: something in it is a link that leads out of it, which would be written to.
        """
        inside = [path for path in (self.path, self.logs) if path.is_dir() and not path.is_symlink()]
        for path in [self.logs, *(entry for folder in inside for entry in _ours(folder))]:
            if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
                raise RunFolderError(
                    f"{path} is a link to {os.readlink(path)}, outside of the run folder. Put there what it points "
                    "to, or remove it. For another disk let the run folder itself be the link: run.dir=FOLDER."
                )


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """See `RunDir.saved_entries`."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunFolderError(f"cannot list the saved states in {folder}: {error.strerror}.") from error
    return sorted((int(match[1]), folder / name) for name in names if (match := STATE_NAME.fullmatch(name)))


def open_run_dir(path: str | os.PathLike[str]) -> RunDir:
    """Return the run folder at ``path``.

    Raises:
        RunFolderError: the folder does not exist, holds no config.yaml, or links that lead out of it.
    """
    try:
        run_dir = RunDir(Path(path).expanduser().resolve())
        run_dir.refuse_links()
        is_run = run_dir.config.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, not allowed
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise RunFolderError(f"{str(path)[:80]} is not a run folder: {reason}.") from error
    if not is_run:
        is_file = run_dir.path.exists()
        state = (
            "has no config.yaml" if run_dir.path.is_dir() else "is a file" if is_file else "does not exist"
        )
        raise RunFolderError(
            f"{path} is not a run folder: it {state}. "
            "Give the folder that gatrain printed, such as outputs/llm/<time>."
        )
    return run_dir


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Hold the run folder for this process; the kernel lets go of it however the process ends.

    Raises:
        RunFolderError: another process holds it, it is a link, or the folder cannot be written.
    """
    import fcntl  # not on every platform; commands that need no lock stay usable there

    handle = _open_lock(run_dir)
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"{run_dir.path} is in use by {_holder(handle)}\n"
                "Wait until that run has ended, or choose another folder with run.dir=FOLDER."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # some network file systems cannot lock; refusing to train there would help nobody
        with contextlib.suppress(OSError):  # on a full disk the lock holds without saying whose it is
            file.truncate(0)
            os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _open_lock(run_dir: RunDir) -> int:
    """What is opened here is emptied: never what a link stands for."""
    try:
        handle = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP or run_dir.lock.is_dir():
            raise RunFolderError(f"{run_dir.lock} is no lock but a link or a folder. Remove it.") from error
        raise RunFolderError(f"cannot write in {run_dir.path}: {error.strerror}.") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise RunFolderError(f"{run_dir.lock} is no lock: it has another name too, or is no file. Remove it.")
    return handle


def _holder(handle: int) -> str:
    """Who holds a lock, and how to end it where that can be done from here."""
    for _ in range(5):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            held = json.loads(os.pread(handle, 1000, 0))
            if type(held["pid"]) is int and isinstance(held["host"], str) and held["host"].isprintable():
                return _told_holder(held["pid"], held["host"])
        time.sleep(0.1)  # it has just taken the lock, and is about to say so
    return "another process."


def _told_holder(pid: int, host: str) -> str:
    who = f"process {pid} on {host}"
    if host != socket.gethostname():
        return f"{who}. If that machine is gone, the file system frees the lock after some minutes."
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return f"{who}, which has ended, but something that it started has not."
    except OSError:
        return f"{who}, another user's."
    return f"{who}. To let it save and stop: kill {pid}"


def _ours(folder: Path) -> list[Path]:
    """What may be written in a run folder; cells of the user's own beside it are nobody's business."""
    names = (
        "config.yaml", "overrides.txt", "plan.json", "hardware.json", "env.json", "metrics.jsonl",
        "evaluations.jsonl", "logs", "saved", "tensorboard", "summary.json", "recorded.json", "data.json",
        "kept", "loggers.json",
    )  # fmt: skip
    return [folder / name for name in names] if folder.name != "logs" else sorted(folder.iterdir())


def open_to_read(path: Path) -> int:
    """Open a regular file, and no link, pipe or device in its place; return its handle.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # a pipe must not keep the opener waiting
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return handle


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most ``most_bytes``.

    Raises:
        RunFolderError: missing or unreadable.
        DamagedFileError: something else than a JSON object, or too large or too deep for one of gatrain's.
    """
    try:
        with open(open_to_read(path), "rb") as file:
            text = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    except OSError as error:
        kind = (
            DamagedFileError if error.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR) else RunFolderError
        )
        why = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror)
        raise kind(f"cannot read {path}: {why}.") from error
    if len(text) > most_bytes:
        raise DamagedFileError(f"cannot read {path}: it is larger than {most_bytes} bytes.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedFileError(f"cannot read {path}: {why}") from error
    if not isinstance(data, dict):
        raise DamagedFileError(f"{path} does not hold a JSON object.")
    return data


def write_json(path: Path, data: Any, *, exact: bool = False, mode: int = 0o666) -> None:
    """Write ``data`` as indented JSON, atomically, without the secrets that this process has met.

    Args:
        exact: no text in it is for people, and each is kept as it is.
        mode: permissions, as far as the umask leaves them.
    """
    write_text(path, json.dumps(data if exact else hide_in(data), indent=2, allow_nan=True) + "\n", mode)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a whole text file atomically and durably, with the permissions in ``mode`` that the umask leaves."""
    with atomic_file(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, contents: bytes, mode: int = 0o666) -> None:
    """As `write_text`, for any contents."""
    with atomic_file(path, mode) as temporary:
        temporary.write_bytes(contents)


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed and renamed over ``path``."""
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    # like any other program's: the system takes the umask, or the folder's default permissions, off
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and those above it; even under a umask of 0 not everybody may write there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o775, exist_ok=True)
    path.mkdir(exist_ok=True)  # a file in its place is said to be one


def fsync(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_oldest(folder: Path, most: int) -> None:
    """Remove the JSON files of a cache that were written first, beyond ``most`` of them.

    Raises:
        OSError: a file cannot be looked at or removed.
    """
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-most]:
        path.unlink(missing_ok=True)
