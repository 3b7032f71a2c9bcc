"""Token ids in flat files, mapped into memory: larger than RAM is fine, only the pages read are loaded."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gatrain.data.folders import unreadable, written_to
from gatrain.data.token_layout import Array, layout
from gatrain.data.token_scan import Scan, converted, first_outside, fitting_dtypes, scan, too_narrow
from gatrain.errors import DataError

LOOKS_S = 0.1
"""Between two looks at whether a mapped file is still what it was, in seconds."""


class TokenFile:
    """A flat array of integers in an ``.npy`` file or in a ``.bin`` file, raw or with a header of a known kind.

    The mapping is opened where it is first used and is not pickled, so the object travels to worker processes
    as a path. A file that is written to while it is in use would give other tokens in silence: it is looked at when
    it is mapped and every `LOOKS_S` of reading.

    Args:
        path: the file.
        dtype: for ``.bin`` without a header: how the numbers are stored, in this machine's byte order.

    Raises:
        DataError: missing, empty, or not what its name says.
    """

    def __init__(self, path: Path, dtype: str = "uint16") -> None:
        self.path = path
        self._written = _size_and_time(path) if path.is_file() else None
        self.layout = layout(path, dtype)
        self._array: Array | None = None
        self._next_look = 0.0
        self._inode = 0
        self.size = self.layout.size

    @property
    def array(self) -> Array:
        """The tokens, ``[size]``, read-only, not loaded.

        Raises:
            DataError: the file was written to since it was opened first.
        """
        if (now := time.monotonic()) >= self._next_look:
            self._check_unchanged()
            self._next_look = now + LOOKS_S
        if self._array is None:
            self._array = np.memmap(
                self.path, dtype=self.layout.dtype, mode="r", offset=self.layout.offset, shape=(self.size,)
            )
        return self._array

    def _check_unchanged(self) -> None:
        """What is mapped stays where another file takes its name, or none has it any more."""
        try:
            stat = self.path.stat()
        except OSError as error:
            if self._array is not None:
                return
            raise unreadable(self.path, error) from error
        if self._array is None:
            self._inode = stat.st_ino
        if stat.st_ino == self._inode and (stat.st_size, stat.st_mtime_ns) != self._written:
            raise written_to(self.path, "token files")

    def read(self, start: int, stop: int) -> Array:
        """Tokens ``start`` to ``stop``, ``[stop - start]``."""
        return np.asarray(self.array)[
            start:stop
        ]  # a plain array: slices of a memmap take three times as long

    def slices(self, start: int, stop: int) -> list[Array]:
        """The same without joining: one array a file."""
        return [self.array[start:stop]]

    @property
    def files(self) -> list[TokenFile]:
        """One file; see `TokenShards`."""
        return [self]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_next_look": 0.0}

    def check_ids(self, vocab_size: int, cache_dir: Path | None = None) -> Scan:
        """Look at every token once, for ids outside the vocabulary and for numbers of another width.

        Raises:
            DataError: names the file, the place and the id.
        """
        found = scan(self.path, self.array, self.layout, cache_dir)
        given = f" read as {self.layout.dtype.name}" if self.layout.kind == "raw" else ""
        if self.layout.kind == "raw" and (wide := too_narrow(found, self.array)) is not None:
            times = wide.itemsize // self.layout.dtype.itemsize
            share = "every second id is" if times == 2 else "three of four ids are"
            advice = (
                f"Use data.token_dtype={wide.name}"
                if wide.isnative
                else f"They are big-endian {wide.name}: convert them with {converted(wide)}"
            )
            raise DataError(f"{self.path}{given}: {share} 0 or nearly, so its numbers are wider. {advice}.")
        if found.low < 0 or found.high >= vocab_size:
            place, token = first_outside(self.array, vocab_size)
            where = self.layout.offset + place * self.layout.dtype.itemsize
            fitting = fitting_dtypes(self.path, self.layout, vocab_size) if self.layout.kind == "raw" else []
            advice = f"Use data.vocab_size={max(found.high + 1, 1)} or more"
            if fitting:
                advice = f"Its numbers fit as {' or '.join(fitting)}"
                advice += (
                    f": convert them with {converted(np.dtype(fitting[0].split()[0]))}"
                    if fitting[0].endswith("big-endian")
                    else f": data.token_dtype={fitting[0]}"
                )
            elif found.low < 0:  # such as -100, which marks labels
                advice = (
                    f"Ids are counted from 0, and the lowest here is {found.low}: write the file without it"
                )
            elif self.layout.kind == "raw":
                advice += ", or correct data.token_dtype if the ids look wrong"
            raise DataError(
                f"{self.path}{given} holds token id {token} at place {place:,} (byte {where:,}), but "
                "data.vocab_size="
                f"{vocab_size} allows 0 to {vocab_size - 1}. {advice}."
            )
        return found


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return stat.st_size, stat.st_mtime_ns


class TokenShards:
    """Several token files as one sequence, in the order given: windows go on over the ends of files."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = list(files)
        self._ends = np.cumsum([file.size for file in self.files]).tolist()
        self.size = int(self._ends[-1])

    def slices(self, start: int, stop: int) -> list[Array]:
        """Tokens ``start`` to ``stop``, one array a file."""
        found = []
        shard = bisect.bisect_right(self._ends, start)
        while start < stop and shard < len(self.files):
            begin = self._ends[shard] - self.files[shard].size
            end = min(stop, self._ends[shard])
            found.append(self.files[shard].array[start - begin : end - begin])
            start, shard = end, shard + 1
        return found

    def read(self, start: int, stop: int) -> Array:
        """The same in one array."""
        parts = self.slices(start, stop)
        return parts[0] if len(parts) == 1 else np.concatenate([part.astype(np.int64) for part in parts])


Tokens = TokenFile | TokenShards


def open_tokens(paths: Sequence[Path], dtype: str) -> Tokens:
    """One file as it is, or several as one sequence."""
    files = [TokenFile(path, dtype) for path in paths]
    return files[0] if len(files) == 1 else TokenShards(files)


class TokenWriter:
    """Writes an ``.npy`` file of tokens piece by piece, without holding them.

    Use it as a context manager; the file is complete when the block ends.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.size = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> TokenWriter:
        self._stream = self.path.open("wb")
        self._write_header()
        return self

    def write(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``."""
        assert self._stream is not None
        self._stream.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.size += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        with self._stream:
            if kind is None:
                data_start = len(self._header(0))
                assert len(self._header(self.size)) == data_start  # numpy leaves room for the length to grow
                self._stream.seek(0)
                self._write_header()

    def _write_header(self) -> None:
        assert self._stream is not None
        self._stream.write(self._header(self.size))

    def _header(self, size: int) -> bytes:
        import io

        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": descr, "fortran_order": False, "shape": (size,)}
        )
        return buffer.getvalue()


def smallest_dtype(vocab_size: int) -> str:
    """``uint16`` where all ids fit, else ``uint32``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def unigram_loss(
    train: Sequence[Array], held_out: Sequence[Array], vocab_size: int, cap: int = 50_000_000
) -> float:
    """Cross-entropy, in nats per token, of the train split's token frequencies on the held-out split.

    This is what a model reaches that knows how common each token is and nothing else. Every id counts once
    more than it occurs (add-one smoothing). At most ``cap`` tokens of each split are read.
    """
    counts, tested = _counts(train, vocab_size, cap), _counts(held_out, vocab_size, cap)
    log_frequency = np.log(counts + 1.0) - math.log(counts.sum() + vocab_size)
    return float(-(tested * log_frequency).sum() / max(1, tested.sum()))


def _counts(arrays: Sequence[Array], vocab_size: int, cap: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for array in arrays:
        for start in range(0, min(len(array), cap), 1 << 22):  # in blocks: bincount copies to int64
            block = array[start : min(start + (1 << 22), cap)].astype(np.int64)
            counts += np.bincount(block, minlength=vocab_size)[:vocab_size]
    return counts
