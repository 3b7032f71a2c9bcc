"""A few samples of any map-style data, read with their own seeds and boiled down to what can be compared later.

Whole numbers, texts, images and names are hashed. Floating numbers differ in their last bits from one kind of CPU
to another, so they come down to a few sums with random signs, which are compared to a part in a thousand. A sample
that is another one when it is read again says nothing and is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gatrain.data.compare import same_print
from gatrain.errors import DataError
from gatrain.tasks.base import Samples, Task
from gatrain.train import samples
from gatrain.units import MIB

COUNT = 8
LIMIT_S = 4.0
"""Reading stops here, with what has been read."""
SUMS = 4
MOST_ARRAYS = 64
"""Arrays of floating numbers in one sample that are compared each by itself."""
CHUNK = MIB
_PLAIN = (str, bytes, int, bool, type(None), np.integer, np.bool_, np.str_, np.bytes_)


@dataclass
class Prints:
    """Some samples of a data set."""

    shapes: str = ""
    samples: dict[str, Any] = field(default_factory=dict)
    """Number of a sample -> its print; JSON-ready."""
    left_out: list[str] = field(default_factory=list)
    """Types inside samples that cannot be compared."""
    unread: list[str] = field(default_factory=list)
    """What was said of samples that could not be read."""
    unstable: int = 0
    """Samples that were another one when they were read again."""


def spread(length: int, count: int = COUNT) -> list[int]:
    """Evenly spread numbers of samples, the first and the last among them."""
    count = min(count, length)
    return [(length - 1) * nth // max(1, count - 1) for nth in range(count)]


def take_prints(
    task: Task, data: Samples, seed: int, numbers: Sequence[int] | None = None, *, again: bool = True
) -> Prints:
    """Read samples and take their prints.

    Args:
        numbers: which; by default a few, evenly spread.
        again: read each a second time, after all others, to see that it stays the same.
    """
    found, until = Prints(), time.monotonic() + LIMIT_S
    shapes: list[str] = []
    left_out: set[str] = set()
    for number in spread(len(data)) if numbers is None else numbers:
        if (shapes or found.unread) and time.monotonic() > until:
            break
        try:
            sample = read_whole(task, data, number, seed)
            found.samples[str(number)] = take_print(sample, left_out)
            shapes.append(describe(sample))
        except Exception as error:
            found.unread.append(why_unread(number, error))
    if again:
        for name in list(found.samples):
            if time.monotonic() > until:
                break
            if not _same_again(task, data, seed, int(name), found.samples[name]):
                del found.samples[name]
                found.unstable += 1
    found.shapes = _merged(shapes)
    found.left_out = sorted(left_out)
    return found


def read_whole(task: Task, data: Samples, number: int, seed: int) -> Any:
    """One sample, read as in the first epoch.

    Raises:
        DataError: it is left out of training.
        Exception: whatever reading it raises.
    """
    (sample,) = samples.read(task, data, [(0, number)], seed)
    if not samples.is_read(sample):
        raise DataError(getattr(sample, "reason", "the data gives None"))
    return sample


def why_unread(number: int, error: Exception) -> str:
    """One line for a sample that could not be read."""
    text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    return f"sample {number}: {text.strip().splitlines()[0] if text.strip() else type(error).__name__}"


def _same_again(task: Task, data: Samples, seed: int, number: int, before: Any) -> bool:
    try:
        sample = read_whole(task, data, number, seed)
    except Exception:
        return False
    return same_print(before, take_print(sample, set()))


def take_print(sample: Any, left_out: set[str]) -> dict[str, Any]:
    """The print of one sample: a hash, and sums of its floating numbers; names what it cannot take in."""
    digest = hashlib.sha256()
    sums: list[npt.NDArray[np.float64]] = []
    for part in _parts(sample, left_out):
        if isinstance(part, bytes):
            digest.update(b"%d:" % len(part))
            digest.update(part)
            continue
        finite = np.isfinite(part)
        if not finite.all():
            digest.update(np.packbits(finite).tobytes())
        found = _sums(np.where(finite, part, 0))
        if len(sums) < MOST_ARRAYS:
            sums.append(found)
        else:
            sums[-1] += found
    return {"hash": digest.hexdigest()[:32], "sums": [[float(f"{x:.9g}") for x in each] for each in sums]}


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The size of an array (its norm), and its sums with random signs."""
    flat = values.reshape(-1)
    found, squares = np.zeros(SUMS), 0.0
    for start in range(0, flat.size, CHUNK):
        block = flat[start : start + CHUNK].astype(np.float64)
        squares += float(block @ block)
        for nth in range(1, SUMS):
            bits = np.random.Generator(np.random.PCG64([nth, start])).bytes(block.size)
            signs = (np.frombuffer(bits, np.uint8) & 1).astype(np.float64) * 2 - 1
            found[nth] += float(block @ signs)
    found[0] = squares**0.5
    return found


def _parts(value: Any, left_out: set[str]) -> Iterator[bytes | npt.NDArray[Any]]:
    """What a value is made of: bytes to hash, and arrays of floating numbers."""
    if isinstance(value, Enum):
        yield f"{type(value).__name__}.{value.name}".encode()
    elif isinstance(value, _PLAIN):
        plain = value.item() if isinstance(value, np.generic) else value
        yield f"{type(plain).__name__}:".encode() + repr(plain).encode("utf-8", "backslashreplace")
    elif isinstance(value, float | complex | np.floating | np.complexfloating):
        yield from _array(np.asarray(value))
    elif isinstance(value, Tensor):
        yield from _tensor(value, left_out)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield from _array(value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield b"key:" + repr(key).encode("utf-8", "backslashreplace")
            yield from _parts(value[key], left_out)
    elif isinstance(value, Set):
        yield from _parts(sorted(map(repr, value)), left_out)
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        yield b"list:%d" % len(value)
        for each in value:
            yield from _parts(each, left_out)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for each in dataclasses.fields(value):
            yield from _parts(getattr(value, each.name, None), left_out)
    elif isinstance(value, PurePath):
        yield str(value).encode("utf-8", "surrogateescape")
    elif type(value).__module__.startswith("PIL."):
        yield f"{value.mode} {value.size}".encode()
        yield value.tobytes()
    elif hasattr(value, "isoformat"):
        yield str(value.isoformat()).encode()
    else:
        left_out.add(f"{type(value).__module__}.{type(value).__qualname__}")
        yield type(value).__qualname__.encode()


def _tensor(value: Tensor, left_out: set[str]) -> Iterator[bytes | npt.NDArray[Any]]:
    if value.layout != torch.strided or value.is_nested or value.is_meta or value.is_quantized:
        left_out.add(f"tensors of layout {value.layout}")
        yield b"tensor"
        return
    plain = value.detach().cpu()
    if plain.is_floating_point():
        yield f"{plain.dtype} {list(plain.shape)}".encode()
        yield plain.to(torch.float64 if plain.dtype == torch.float64 else torch.float32).numpy()
    elif plain.is_complex():
        yield f"{plain.dtype}".encode()
        yield from _tensor(torch.view_as_real(plain.resolve_conj()), left_out)
    else:
        yield f"{plain.dtype} {list(plain.shape)}".encode()
        yield plain.contiguous().numpy().tobytes()


def _array(value: npt.NDArray[Any]) -> Iterator[bytes | npt.NDArray[Any]]:
    yield f"{value.dtype} {list(value.shape)}".encode()
    if value.dtype.kind == "f":
        yield value
    elif value.dtype.kind == "c":
        yield value.real
        yield value.imag
    else:
        yield np.ascontiguousarray(value).tobytes()


# --- for people -----------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """What a sample is, in a few words: ``float32 [3, 32, 32], int``."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {describe(value[key])}" for key in list(value)[:6]) + (
            ", ..." if len(value) > 6 else ""
        )
    if isinstance(value, list | tuple):
        if len(value) > 4:
            return f"{type(value).__name__} of {len(value)}"
        return ", ".join(map(describe, value))
    if type(value).__module__.startswith("PIL."):
        return f"image {value.mode} {value.size[0]}x{value.size[1]}"
    return "None" if value is None else type(value).__name__


def _merged(shapes: list[str]) -> str:
    """One description of all: numbers that differ become a range."""
    if not shapes:
        return ""
    pieces = [re.split(r"(\d+)", shape) for shape in shapes]
    if len({tuple(each[::2]) for each in pieces}) > 1:
        return " or ".join(list(dict.fromkeys(shapes))[:2])
    merged = []
    for place, same in enumerate(zip(*pieces, strict=True)):
        if place % 2 and len(set(same)) > 1:
            numbers = sorted(map(int, same))
            merged.append(f"{numbers[0]} to {numbers[-1]}")
        else:
            merged.append(same[0])
    return "".join(merged)
