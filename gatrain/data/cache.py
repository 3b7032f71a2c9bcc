"""Folders of prepared data, built once by whichever process comes first and shared by all.

The folder's name is a fingerprint of everything that determines its contents, so a cache is never updated: it
is complete, or it is built again. Ranks, trials and runs that start together wait for one builder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
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
    folder = root / name
    if is_complete(folder):
        return folder
    try:
        make_folders(root)
        with FileLock(root / f"{name}.lock"):
            if not is_complete(folder):  # another process may have built it while this one waited
                log.info("preparing data in %s (once)", folder)
                _build(folder, build)
    except OSError as error:
        raise DataError(
            f"cannot write the data cache {folder}: {error}. Set GATRAIN_CACHE to a folder of your own with free "
            "space, for example GATRAIN_CACHE=$HOME/gatrain-cache."
        ) from error
    return folder


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


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Build in a temporary folder beside the final one, under the caller's lock."""
    for stale in folder.parent.glob(f".{folder.name}.*"):  # left by a builder that was killed
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        build(temporary)
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            fsync(path)
        manifest = {path.name: {"size": path.stat().st_size, "sha256": _hash(path)} for path in files}
        write_json(temporary / MANIFEST, {"files": manifest}, exact=True)
        _note_verified(temporary, {path.name: _state(path) for path in files})
        temporary.chmod(0o755)  # a shared cache is readable by all, unlike a private temporary folder
        os.rename(temporary, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _state(path: Path) -> list[int]:
    """Another one where a file was written, replaced or copied; its times of change cannot be set back."""
    stat = path.stat(follow_symlinks=False)
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
