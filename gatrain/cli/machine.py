"""What every command takes for granted of a machine, made so or told in one sentence, before anything else runs.

A working folder that exists, a home, a folder for temporary files with a path that sockets bear, a cache that may
be written. What is changed is changed in this process's environment, which all children inherit.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from gatrain import assets, imports
from gatrain.errors import ConfigError, LaunchError

SOCKET_PATH_BYTES = 107
"""Longest path of a socket on Linux; 103 on macOS."""
LONGEST_SOCKET_BYTES = 52
"""Of what multiprocessing and PyTorch add to the folder for temporary files."""


_long: list[str] = []
"""The folder for temporary files that has a short name here."""


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Everything is in its place in here.

    Raises:
        LaunchError: something is missing that cannot be replaced; says what to set.
    """
    _check_working_folder()
    _settle_import_path()
    _settle_temporary_folder()
    _settle_user()
    _settle_cache()
    link = _short_temporary_folder()
    try:
        yield
    finally:
        if link is not None:
            with contextlib.suppress(OSError):
                link.unlink()


def note(text: str) -> None:
    """Say something about this machine on standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _check_working_folder() -> None:
    try:
        here = os.getcwd()
    except OSError as error:
        raise LaunchError(
            f"the working folder is not there any more ({error.strerror}). Change to one that is: cd FOLDER."
        ) from error
    if not os.access(here, os.R_OK | os.X_OK):
        raise LaunchError(
            f"the working folder {here} may not be read by this user. Change to another: cd FOLDER."
        )


def _settle_import_path() -> None:
    """The working folder comes last for this process and its children, which look there for the user's modules."""
    here = os.path.realpath(os.getcwd())
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(entry and os.path.realpath(entry) == here for entry in listed) and not _holds_gatrain(here):
        others = [entry for entry in listed if entry and os.path.realpath(entry) != here]
        os.environ["PYTHONPATH"] = os.pathsep.join(others)
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or here) != here]
    is_listed = any(entry and os.path.realpath(entry) == here for entry in listed)
    if _holds_gatrain(here) and not is_listed and PathFinder.find_spec("gatrain", elsewhere) is None:
        # a checkout that is not installed: children do not look here by themselves
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, listed)])


def _holds_gatrain(folder: str) -> bool:
    return os.path.realpath(os.path.join(folder, "gatrain")) == str(Path(imports.__file__).resolve().parent)


def _settle_temporary_folder() -> None:
    """``TMPDIR`` is a folder that may be written, or is replaced by what Python falls back to."""
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LaunchError(
            "there is no folder for temporary files that may be written: neither TMPDIR nor /tmp. "
            "Set TMPDIR=FOLDER to one."
        ) from error
    asked = os.environ.get("TMPDIR")
    if asked is None or asked == found:
        return
    if os.path.abspath(asked) != found:
        note(f"TMPDIR={asked} is no folder that may be written: {found} is used instead.")
    os.environ["TMPDIR"] = found


def _short_temporary_folder() -> Path | None:
    """A short name for a folder whose path is too long for the sockets of loader processes: a link to it.

    Raises:
        LaunchError: there is no place for one.
    """
    found = tempfile.gettempdir()
    limit = SOCKET_PATH_BYTES - LONGEST_SOCKET_BYTES
    if len(os.fsencode(found)) <= limit:
        return None
    prefix = f"gatrain-tmp-{os.getuid()}-"
    for place in map(Path, ("/tmp", "/var/tmp", "/dev/shm")):
        with contextlib.suppress(OSError):
            _sweep_links(place, prefix)
            link = Path(tempfile.mktemp(prefix=f"{prefix}{os.getpid()}-", dir=place))
            link.symlink_to(found)  # fails where the name is taken
            _long[:] = [found]
            os.environ["TMPDIR"], tempfile.tempdir = str(link), str(link)
            return link
    raise LaunchError(
        f"the folder for temporary files, {found}, has a path of {len(os.fsencode(found))} bytes, too long for "
        f"the sockets of processes that load data. Set TMPDIR=FOLDER to one of at most {limit} bytes."
    )


def restore_temporary_folder() -> None:
    """For another machine, where the short name is not."""
    if _long:
        os.environ["TMPDIR"] = _long[0]


def _sweep_links(place: Path, prefix: str) -> None:
    """Remove the links of dead commands of this user."""
    for link in place.glob(f"{prefix}*"):
        pid = link.name.removeprefix(prefix).partition("-")[0]
        found = link.lstat()
        if stat.S_ISLNK(found.st_mode) and found.st_uid == os.getuid() and pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                link.unlink()


def _settle_user() -> None:
    """A container's user may have no entry in the list of users, and no home: libraries fail over both."""
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["USER"] = os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        folder = _own_folder("gatrain-home", "HOME")
        os.environ["HOME"] = str(folder)
        note(f"this user has no home folder: {folder} serves as one. Set HOME to one that lasts.")


def _settle_cache() -> None:
    """A home that cannot be written, such as ``/``, holds no cache; one that everybody may write is not used."""
    try:
        cache = assets.cache_place()
    except ConfigError:
        return  # told where it is needed
    try:
        assets.safe_cache(cache)
    except ConfigError as error:
        note(f"{error} Until then {_own_cache()} holds the cache.")
        return
    if any(os.environ.get(name) for name in ("GATRAIN_CACHE", "XDG_CACHE_HOME")):
        return
    with contextlib.suppress(OSError):
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if existing == cache or os.access(existing, os.W_OK | os.X_OK):
            return
    note(
        f"{cache} cannot be written: {_own_cache()} holds the cache. Set GATRAIN_CACHE=FOLDER to one that lasts."
    )


def _own_cache() -> Path:
    """From here on the cache, of child processes too."""
    folder = _own_folder("gatrain-cache", "GATRAIN_CACHE")
    os.environ["GATRAIN_CACHE"] = str(folder)
    return folder


def _own_folder(name: str, variable: str) -> Path:
    """A folder for temporary files with a fixed name that is this user's alone.

    Raises:
        LaunchError: somebody else has it.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    raise LaunchError(f"{folder} is not this user's alone. Set {variable}=FOLDER to a folder that is.")
