"""Temporary folders that do not outlive their owner for long.

Each holds a file that its owner keeps locked. The kernel lets go of the lock however the owner ends, in whatever
container it was, so that the next start knows the folders of the dead from those of the living.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gatrain import guardian

PREFIXES = ("gatrain_", "gatrain-")
OWNER = ".owner"

SHORT = tuple(map(Path, ("/tmp", "/dev/shm", "/var/tmp")))
LONGEST_BYTES = 70
"""Of a folder in which sockets have names: the system takes 107 bytes with a name of multiprocessing's."""

_held: dict[Path, int] = {}
"""The locked file of each folder of this process."""
_swept: set[Path] = set()
_beside: dict[Path, Path] = {}
"""Folders for sockets of folders whose own names are too long."""


def make(prefix: str, parent: Path | None = None) -> Path:
    """A new folder that is private to this user; `remove` it when it is over.

    Args:
        prefix: how its name begins, with one of `PREFIXES`.
        parent: default the folder for temporary files.
    """
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    guardian.guard_folder(folder)
    with contextlib.suppress(
        OSError
    ):  # a file system without locks: nobody takes the folder for a dead one's
        handle = os.open(folder / f"{OWNER}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(folder / f"{OWNER}.new", folder / OWNER)  # whoever sees it sees it locked
        except OSError:
            os.close(handle)
            raise
        _held[folder] = handle
    return folder


def remove(folder: Path) -> None:
    """Remove a folder that `make` has made, as far as that is possible."""
    if (sockets := _beside.pop(folder, None)) is not None:
        remove(sockets)
    shutil.rmtree(folder, ignore_errors=True)
    guardian.forget_folder(folder)
    if (handle := _held.pop(folder, None)) is not None:
        os.close(handle)


def sockets_of(folder: Path) -> Path:
    """A folder that goes with one of `make`, for the sockets of its processes; its name is short if possible."""
    own = folder / "s"
    if len(os.fsencode(own)) > LONGEST_BYTES:
        for parent in SHORT:
            with contextlib.suppress(OSError):
                _beside[folder] = make("gatrain_", parent)
                return _beside[folder]
    own.mkdir(exist_ok=True)
    return own


@contextlib.contextmanager
def folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """`make` and `remove`."""
    made = make(prefix, parent)
    try:
        yield made
    finally:
        remove(made)


def sweep(parent: Path | None = None) -> None:
    """Remove what dead owners of this user have left; once for each parent in a process."""
    where = Path(tempfile.gettempdir() if parent is None else parent).resolve()
    if where in _swept:
        return
    _swept.add(where)
    with contextlib.suppress(OSError), os.scandir(where) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIXES) and _is_own_folder(entry):
                _remove_if_dead(Path(entry.path))


def _is_own_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        found = entry.stat(follow_symlinks=False)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _remove_if_dead(folder: Path) -> None:
    if folder in _held:
        return
    with contextlib.suppress(OSError):  # not one of ours, or its owner lives
        handle = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _forget_in_fork() -> None:
    """A fork must not keep the locks of a parent that has died."""
    for handle in _held.values():
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_fork)
