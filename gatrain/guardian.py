"""What a launcher leaves behind when it is killed is cleared by a process that outlives it.

SIGKILL, SIGQUIT, a crash: the launcher itself can do nothing any more. The guardian (this file, run as a program,
the standard library alone) is started with the first thing that must not stay behind, and listens to a pipe that
nobody else holds. At its end it kills what is left of the process groups, removes the temporary folders, and takes
away a run folder in which nothing was ever trained. After an orderly end nothing is left to do.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

GONE_S = 3.0
"""Seconds that killed processes have to disappear; a zombie without a parent that asks for it never does."""
LOCK_S = 1.0
"""Seconds until the lock of a dead launcher is free: the kernel closes its files one after another."""
IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP,
)  # fmt: skip

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_owner = 0
"""The process that started it: a fork has none."""


def guard_group(pid: int) -> None:
    """Let this process group die with this process."""
    _tell("group", pid)


def forget_group(pid: int) -> None:
    """The group has ended, or goes its own way."""
    _tell("no group", pid)


def guard_folder(folder: Path) -> None:
    """Let this folder be removed when this process dies."""
    _tell("folder", str(folder))


def forget_folder(folder: Path) -> None:
    """The folder is gone."""
    _tell("no folder", str(folder))


def guard_claim(folder: Path, before: Iterable[str], created: Sequence[Path]) -> None:
    """Let `clear_claim` be called when this process dies."""
    _tell("claim", str(folder), sorted(before), [str(each) for each in created])


def forget_claim(folder: Path) -> None:
    """There is something to keep in the folder, or it was cleared."""
    _tell("no claim", str(folder))


def clear_claim(folder: Path, before: Iterable[str], created: Iterable[Path]) -> None:
    """Remove what was added to a folder, and those folders above it that were made and are empty.

    Args:
        before: names of what was there already.
        created: folders that were made, deepest first.
    """
    kept = set(before)
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.name not in kept:
                remove(entry)
    for each in created:
        with contextlib.suppress(OSError):
            each.rmdir()


def remove(entry: Path) -> None:
    """Remove a file, a link or a folder with all it holds, as far as that is possible."""
    with contextlib.suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _tell(*words: object) -> None:
    """Send one line, in one piece. Without a guardian everything works, and stays behind after a kill."""
    global _process, _owner
    starts = not str(words[0]).startswith("no ")
    with _lock, contextlib.suppress(OSError, ValueError):
        if _owner != os.getpid():
            _process = None  # of the process that this one was forked from
        if _process is None and starts:
            _owner, _process = os.getpid(), _start()
        if _process is not None and _process.stdin is not None:
            os.write(_process.stdin.fileno(), json.dumps(words).encode() + b"\n")


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(_let_end, process)
    return process


def _let_end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None and _owner == os.getpid():
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


# --- the guardian's process -------------------------------------------------------------------------------


def main() -> None:
    """Listen until the launcher has ended; then clear what it has left."""
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    groups: set[int] = set()
    folders: set[str] = set()
    claims: dict[str, tuple[list[str], list[str]]] = {}
    for line in sys.stdin.buffer:
        try:
            kind, name, *more = json.loads(line)
        except ValueError:  # cut short by the launcher's death
            continue
        if kind == "group":
            groups.add(int(name))
        elif kind == "no group":
            groups.discard(int(name))
        elif kind == "folder":
            folders.add(name)
        elif kind == "no folder":
            folders.discard(name)
        elif kind == "claim":
            claims[name] = (more[0], more[1])
        elif kind == "no claim":
            claims.pop(name, None)
    _kill(groups)
    for name in folders:
        remove(Path(name))
    for name, (before, created) in claims.items():
        if _take_lock(Path(name) / ".lock"):
            clear_claim(Path(name), before, [Path(each) for each in created])


def _kill(groups: set[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while groups and time.monotonic() < deadline:
        for group in list(groups):
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                groups.discard(group)
            except PermissionError:  # the number is somebody else's by now
                groups.discard(group)
        if groups and all(map(_is_zombie, groups)):
            return
        time.sleep(0.02)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _take_lock(path: Path) -> bool:
    """Whether nobody else has the run folder by now. The lock is held until this process ends."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


if __name__ == "__main__":
    main()
