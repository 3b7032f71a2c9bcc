"""Folders of prepared data, built once by whichever process comes first and shared by all.

The folder's name is a fingerprint of everything that determines its contents, so a cache is never updated: it
is complete, or it is built again. Ranks, trials and runs that start together wait for one builder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from gatrain import assets
from gatrain.errors import DataError
from gatrain.rundir import fsync, write_json

FORMAT_VERSION = 1
"""Raise it when the same inputs give different files, so that old folders are not read."""

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of all caches: ``cache_dir``, else `gatrain.assets.cache_dir`."""
    return Path(cache_dir).expanduser() if cache_dir is not None else assets.cache_dir()


def build_once(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], None],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the complete folder for ``key``, calling ``build(temporary folder)`` if there is none.

    A folder whose files do not have the sizes of its manifest is thrown away and built again. The finished
    folder is flushed to the disk and renamed into place, so nobody ever sees half of it.

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
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not is_complete(folder):  # another process may have built it while this one waited
                log.info("preparing data in %s (once)", folder)
                _build(folder, build)
    except OSError as error:
        raise DataError(
            f"cannot write the data cache {folder}: {error}. "
            "Name a folder with free space that you may write, for example GATRAIN_CACHE=/tmp/gatrain."
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """True if every file that the manifest names is there with the size it had when it was finished."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


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
        write_json(temporary / MANIFEST, {"files": {path.name: path.stat().st_size for path in files}})
        temporary.chmod(0o755)  # a shared cache is readable by all, unlike a private temporary folder
        os.rename(temporary, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
