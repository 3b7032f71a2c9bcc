"""Folders of prepared data, built once by whichever process comes first and shared by all.

The folder's name is a fingerprint of everything that determines its contents, so a cache is never updated: it
is complete, or it is built again. Ranks, trials and runs that start together wait for one builder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

from filelock import FileLock

from gatrain import assets
from gatrain.errors import DataError, RunFolderError
from gatrain.rundir import fsync, make_folders, read_json, write_json

FORMAT_VERSION = 2
"""Raise it when the same inputs give different files, so that old folders are not read."""

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
"""Which files were read and found right, and when."""
VERIFIED_FOR_S = 86400.0

log = logging.getLogger(__name__)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of all caches: ``cache_dir``, else `gatrain.assets.cache_dir`.

    Raises:
        ConfigError: others may write there.
    """
    return assets.cache_dir() if cache_dir is None else assets.safe_cache(Path(cache_dir).expanduser())


def build_once(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], None],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the complete folder for ``key``, calling ``build(temporary folder)`` if there is none.

    A folder whose files do not have the sizes and hashes of its manifest is thrown away and built again. The
    finished folder is flushed to the disk and renamed into place, so nobody ever sees half of it.

    Args:
        kind: first part of the folder's name, for people.
        key: JSON-ready facts that determine the contents.
        build: fills an empty folder.
        cache_dir: see `cache_root`.

    Raises:
        DataError: the cache folder cannot be written.
    """
    text = json.dumps({"format": FORMAT_VERSION, **key}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    root = cache_root(cache_dir)
    # what others of a shared cache have built may be theirs alone, by their umask: then this user has one beside
    places = [root / name, root / f"{name}-u{os.geteuid()}"]
    if found := _complete(places):
        return found
    try:
        make_folders(root)
        with FileLock(root / f"{name}-u{os.geteuid()}.lock"):  # nobody can open another's
            # another process may have built it while this one waited
            return _complete(places) or _build(places, build)
    except OSError as error:
        raise DataError(_unwritable(root, error)) from error


def _unwritable(root: Path, error: OSError) -> str:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    state, room = ("has no space left", " with free space") if is_full else ("cannot be written", "")
    return (
        f"the data cache {root} {state}: {error}. Set GATRAIN_CACHE to a folder of your own{room}, for example "
        "GATRAIN_CACHE=$HOME/gatrain-cache."
    )


def _complete(places: Sequence[Path]) -> Path | None:
    return next((folder for folder in places if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """True if every file that the manifest names is there with the size and the contents it had once finished.

    Contents are read again where a file is another than the one that was read last (by size, times and inode), and
    once a day: the disk may lose what nobody has touched.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
        states = {name: _state(folder / Path(name).name) for name in files}
        if not files or any(states[name][0] != entry["size"] for name, entry in files.items()):
            return False
        if _is_verified(folder, states):
            return True
        if any(_hash(folder / name) != entry["sha256"] for name, entry in files.items()):
            log.warning("the data cache %s is damaged and is built again", folder)
            return False
    except (OSError, RunFolderError, ValueError, KeyError, TypeError, AttributeError):
        return False
    _note_verified(folder, states)
    return True


def _build(places: Sequence[Path], build: Callable[[Path], None]) -> Path:
    """Build in a temporary folder and rename it to the first place that this user may have; return that.

    Raises:
        OSError: nothing can be written.
    """
    root, name = places[0].parent, places[0].name
    log.info("preparing data in %s (once)", places[0])
    for stale in root.glob(f".{name}.*"):  # left by a builder of this user that was killed
        with contextlib.suppress(OSError):
            if stale.lstat().st_uid == os.geteuid():
                shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}."))
    try:
        build(temporary)
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            fsync(path)
        manifest = {path.name: {"size": path.stat().st_size, "sha256": _hash(path)} for path in files}
        write_json(temporary / MANIFEST, {"files": manifest}, exact=True)
        _note_verified(temporary, {path.name: _state(path) for path in files})
        # a shared cache is readable as its files are by the umask, unlike a private temporary folder
        readable = (temporary / MANIFEST).stat().st_mode & 0o044
        temporary.chmod(0o700 | readable | readable >> 2)
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
            try:
                os.rename(temporary, place)
            except OSError:  # somebody else's, who may be done by now
                if is_complete(place):
                    return place
                if place == places[-1]:
                    raise
                continue
            fsync(root)
            return place
        raise AssertionError("there is a place at least")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _state(path: Path) -> list[int]:
    """Another one where a file was written, replaced or copied; its times of change cannot be set back."""
    stat = path.stat(follow_symlinks=False)
    if not S_ISREG(stat.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_verified(folder: Path, states: Mapping[str, list[int]]) -> bool:
    if not (folder / VERIFIED).is_file():
        return False
    noted = read_json(folder / VERIFIED)
    return noted["files"] == dict(states) and 0 <= time.time() - float(noted["at"]) < VERIFIED_FOR_S


def _note_verified(folder: Path, states: Mapping[str, list[int]]) -> None:
    """Where that fails, as in a cache of somebody else, the contents are read again next time."""
    with contextlib.suppress(OSError):
        write_json(folder / VERIFIED, {"at": time.time(), "files": states}, exact=True)
