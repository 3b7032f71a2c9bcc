"""One pass over all ids of a token file, remembered by the file's identity so that it costs its seconds once."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatrain import assets
from gatrain.data.token_layout import TOKEN_DTYPES, Array, Layout
from gatrain.errors import RunFolderError
from gatrain.rundir import drop_oldest, read_json, write_json

BLOCK = 1 << 22
KEPT_BYTES = 1 << 25
"""Smaller files are looked at each time: that takes some milliseconds."""
MAX_KEPT = 2000
SETTLED_NS = 2_000_000_000
LARGEST_HALF = 16
"""In 16 bits, the upper halves of wider ids stay below it, for vocabularies of up to a million."""
FEWEST = 16
"""Ids that are needed to tell a width."""


@dataclass(frozen=True)
class Scan:
    """Smallest and largest id, and the largest at even and at odd places."""

    low: int
    high: int
    even_high: int
    odd_high: int
    size: int


def scan(path: Path, array: Array, layout: Layout, cache_dir: Path | None = None) -> Scan:
    """Look at every id, or remember that it was done."""
    kept = _kept_file(path, layout, cache_dir) if array.nbytes >= KEPT_BYTES else None
    if kept is not None and (known := _recall(kept)) is not None and known.size == array.size:
        return known
    began_ns = time.time_ns()
    low, high, even, odd = 0, 0, 0, 0
    for start in range(0, array.size, BLOCK):
        block = array[start : start + BLOCK]
        even = max(even, int(block[::2].max()))
        if block.size > 1:
            odd = max(odd, int(block[1::2].max()))
        if array.dtype.kind == "i":
            low = min(low, int(block.min()))
    high = max(even, odd)
    found = Scan(low, high, even, odd, int(array.size))
    if kept is not None and path.stat().st_mtime_ns < began_ns - SETTLED_NS:
        with contextlib.suppress(OSError, ValueError):
            write_json(kept, asdict(found))
            drop_oldest(kept.parent, MAX_KEPT)
    return found


def too_narrow(found: Scan, array: Array) -> np.dtype[Any] | None:
    """The type that the numbers have, where every second one is the empty upper half of a wider one."""
    width = array.dtype.itemsize
    small, large = sorted((found.even_high, found.odd_high))
    if found.size < FEWEST or width >= 8 or small >= LARGEST_HALF or small == large:
        return None
    if small and large < 256:  # small numbers everywhere show nothing
        return None
    order, upper = ("<", 2) if found.odd_high == small else (">", 1)
    is_quarter = width == 2 and array.size % 4 == 0 and not array[upper : 1 << 20 : 4].any()
    name = "int64" if is_quarter else {1: "uint16", 2: "uint32", 4: "int64"}[width]
    return np.dtype(f"{order}{np.dtype(name).str[1:]}")


def converted(dtype: np.dtype[Any]) -> str:
    """The Python that turns a file of big-endian numbers into one that can be read."""
    code = dtype.str[1:]
    return f"numpy.fromfile(path, '>{code}').astype('<{code}').tofile(new)"


def first_outside(array: Array, vocab_size: int) -> tuple[int, int]:
    """Place and value of the first id that the vocabulary does not have; there must be one."""
    for start in range(0, array.size, BLOCK):
        block = array[start : start + BLOCK]
        wrong = np.flatnonzero((block >= vocab_size) | (block < 0))
        if wrong.size:
            return start + int(wrong[0]), int(block[wrong[0]])
    raise ValueError("every id is in the vocabulary")


def fitting_dtypes(path: Path, layout: Layout, vocab_size: int) -> list[str]:
    """The types as which the beginning of a raw file holds ids of the vocabulary only; byte-swapped ones last."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(1 << 20)
    fitting = []
    for order, name in ((order, name) for order in ("<", ">") for name in TOKEN_DTYPES):
        dtype = np.dtype(f"{order}{np.dtype(name).str[1:]}")
        if dtype == layout.dtype or dtype.itemsize == 1 or size % dtype.itemsize:
            continue
        ids = np.frombuffer(head[: len(head) // dtype.itemsize * dtype.itemsize], dtype=dtype)
        if ids.size < FEWEST or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or not ids.any():
            continue
        if int(ids[1::2].max()) < LARGEST_HALF <= int(ids[::2].max()):
            continue
        fitting.append(name if order == "<" else f"{name} big-endian")
    return fitting


def _kept_file(path: Path, layout: Layout, cache_dir: Path | None) -> Path | None:
    try:
        stat = path.stat()
        identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        text = repr([1, *identity, layout.dtype.str, layout.offset])
        root = cache_dir if cache_dir is not None else assets.cache_dir()
    except (OSError, RuntimeError):
        return None
    return (
        root
        / "token_scans"
        / f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    )


def _recall(path: Path) -> Scan | None:
    try:
        found = read_json(path)
        if found.keys() == Scan.__dataclass_fields__.keys() and all(
            type(each) is int for each in found.values()
        ):
            return Scan(**found)
    except RunFolderError:
        pass
    return None
