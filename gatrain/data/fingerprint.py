"""Hash of what files hold: the same wherever they lie, another when their contents or names change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gatrain.assets import cache_dir
from gatrain.errors import DataError, RunFolderError
from gatrain.rundir import drop_oldest, read_json, write_text
from gatrain.units import GIB

VERSION = 2
"""Of the way of hashing: raise it when the same contents give another hash."""
WHOLE_BYTES = GIB
"""A data set up to this size counts with every byte. Of a larger one, blocks spread evenly over every file count,
about as many bytes in all: an exchange of its contents shows, a few changed bytes between two blocks do not."""
BLOCK_BYTES = 1 << 16
MIN_BLOCK_BYTES = 1 << 11
"""Of a million files two such blocks each count: more would mean reading all of them."""
MAX_CACHES = 5000
KEPT_BYTES, KEPT_FILES = 1 << 22, 200
"""Fewer bytes and files of a folder are hashed anew each time: that is as quick as asking the cache."""
THREADS = 16
SETTLED_NS = 2_000_000_000
"""A file that was written less than this before it was read may be written again without another time of change."""

State = tuple[int, int, int, int]
"""Size, mtime, ctime (ns) and inode."""


def content_fingerprint(files: Sequence[Path], root: Path | None = None) -> str:
    """Hash the contents, sizes and names of ``files``, in their order.

    Names count relative to ``root``, so a moved or copied data set has the same fingerprint; a single file's name
    does not count, only its suffix. Hashes of files are kept in the cache folder by path, size, times and inode.

    Args:
        files: regular files.
        root: folder that they belong to; by default the deepest that holds them all.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [os.path.abspath(file) for file in files]
    states = [_state(path) for path in paths]
    total = sum(state[0] for state in states)
    blocks = Blocks() if total <= WHOLE_BYTES else _blocks_of_each(len(paths))
    digests = _digests(paths, states, blocks)
    digest = hashlib.sha256(f"{VERSION} {len(paths)} {blocks.count} {blocks.size_bytes}\n".encode())
    names = _names(paths, root)
    for name, state, content in zip(names, states, digests, strict=True):
        digest.update(f"{len(name)} {name} {state[0]} {content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Blocks:
    """How much of a file counts: that many blocks of that size, or all of it (0 of them)."""

    count: int = 0
    size_bytes: int = 0


def _blocks_of_each(files: int) -> Blocks:
    """Powers of two, so that one file more seldom makes all others count anew."""
    budget = WHOLE_BYTES // max(1, files)
    size = min(BLOCK_BYTES, max(MIN_BLOCK_BYTES, _power_of_two(budget // 2)))
    return Blocks(max(2, _power_of_two(budget // size)), size)


def _power_of_two(limit: int) -> int:
    """The largest one within the limit; 0 below 1."""
    return 1 << (limit.bit_length() - 1) if limit > 0 else 0


def _names(paths: Sequence[str], root: Path | None) -> list[str]:
    if len(paths) == 1 and (root is None or not root.is_dir()):
        return [Path(paths[0]).suffix]
    given = os.path.abspath(root) if root is not None else os.path.commonpath(map(os.path.dirname, paths))
    bases = [os.path.join(base, "") for base in dict.fromkeys((given, os.path.realpath(given)))]
    return [
        # what a link leads to elsewhere has no place below the root
        next((path[len(base) :] for base in bases if path.startswith(base)), os.path.basename(path))
        for path in paths
    ]


def _state(path: str) -> State:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no regular file. Give files with data in them.")
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _unreadable(path: str, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"cannot read {path}: {reason}. Check the file and its permissions.")


def _digests(paths: Sequence[str], states: Sequence[State], blocks: Blocks) -> list[str]:
    """Hash of each file, from the cache where it has not changed; one small cache file for each folder."""
    found: dict[str, str] = {}
    places = dict(zip(paths, states, strict=True))
    for folder, group in groupby(sorted(places), key=os.path.dirname):
        inside = list(group)
        known = _recall(folder, blocks)
        kept = {path: known[name] for path in inside if (name := os.path.basename(path)) in known}
        hits = {path: entry[1] for path, entry in kept.items() if entry[0] == list(places[path])}
        missing = [path for path in inside if path not in hits]
        began_ns = time.time_ns()
        fresh = dict(zip(missing, _hash_all(missing, places, blocks), strict=True))
        found |= hits | fresh
        settled = [path for path in fresh if max(places[path][1:3]) < began_ns - SETTLED_NS]
        if len(settled) >= KEPT_FILES or sum(places[path][0] for path in settled) >= KEPT_BYTES:
            entries = {
                os.path.basename(path): [list(places[path]), found[path]] for path in [*hits, *settled]
            }
            others = {
                name: entry for name, entry in known.items() if os.path.exists(os.path.join(folder, name))
            }
            _keep(folder, blocks, others | entries)
    return [found[path] for path in paths]


def _hash_all(paths: Sequence[str], states: dict[str, State], blocks: Blocks) -> Iterable[str]:
    def one(path: str) -> str:
        return _hash_file(path, states[path][0], blocks)

    if len(paths) < THREADS:
        return [one(path) for path in paths]
    with ThreadPoolExecutor(THREADS) as pool:  # waits for the disk, and hashes outside of Python's lock
        return list(pool.map(one, paths))


def _hash_file(path: str, size: int, blocks: Blocks) -> str:
    """Hash a whole file, or blocks of it, the first and the last among them."""
    try:
        with open(path, "rb", buffering=0) as file:
            if not blocks.count or size <= blocks.count * blocks.size_bytes:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
            digest = hashlib.sha256()
            for nth in range(blocks.count):
                file.seek((size - blocks.size_bytes) * nth // (blocks.count - 1))
                digest.update(file.read(blocks.size_bytes))
            return digest.hexdigest()[:32]
    except OSError as error:
        raise _unreadable(path, error) from error


def _cache_file(folder: str, blocks: Blocks) -> Path:
    kind = f"{VERSION} {blocks.count} {blocks.size_bytes}"
    name = hashlib.sha256(f"{kind} {folder}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir() / "fingerprints" / f"{name}.json"


def _recall(folder: str, blocks: Blocks) -> dict[str, Any]:
    """Name -> [state, hash]; what is damaged counts as missing."""
    with contextlib.suppress(RunFolderError, OSError, RuntimeError):
        stored = read_json(_cache_file(folder, blocks))
        return {name: entry for name, entry in stored.items() if _is_entry(entry)}
    return {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _keep(folder: str, blocks: Blocks, entries: dict[str, Any]) -> None:
    """Where that fails, the files are read again next time."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = _cache_file(folder, blocks)
        write_text(path, json.dumps(entries) + "\n", mode=0o600)  # names of files may tell something
        drop_oldest(path.parent, MAX_CACHES)
