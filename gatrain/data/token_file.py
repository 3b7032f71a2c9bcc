"""Token ids in one flat file, mapped into memory: larger than RAM is fine, only the pages read are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gatrain.errors import DataError, nearest

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
CHECKED_TOKENS = 1 << 20

Array = npt.NDArray[Any]


class TokenFile:
    """A flat array of integers in an ``.npy`` file or in a raw ``.bin`` file.

    The mapping is opened where it is first used and is not pickled, so the object travels to worker processes
    as a path.

    Args:
        path: the file.
        dtype: for ``.bin``: how the numbers are stored, in this machine's byte order.

    Raises:
        DataError: missing, empty, or not what its name says.
    """

    def __init__(self, path: Path, dtype: str = "uint16") -> None:
        self.path = path
        self.dtype = dtype
        self._array: Array | None = None
        self.size = int(self.array.size)

    @property
    def array(self) -> Array:
        """The tokens, ``[size]``, read-only, not loaded."""
        if self._array is None:
            self._array = self._open()
        return self._array

    def _open(self) -> Array:
        if not self.path.is_file():
            raise DataError(
                f"{self.path} is not there or is not a file. Give a token file ending in .bin or .npy."
            )
        if self.path.stat().st_size == 0:
            raise DataError(f"{self.path} is empty. Give a file with tokens in it.")
        try:
            if self.path.suffix == ".npy":
                array: Array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            else:
                if self.dtype not in TOKEN_DTYPES:
                    raise DataError(
                        f"data.token_dtype={self.dtype} is not one of {', '.join(TOKEN_DTYPES)}."
                        f"{nearest(self.dtype, TOKEN_DTYPES)}"
                    )
                array = np.memmap(self.path, dtype=self.dtype, mode="r")
        except (OSError, ValueError) as error:
            what = ".npy array" if self.path.suffix == ".npy" else f"sequence of {self.dtype} numbers"
            raise DataError(
                f"cannot read {self.path} as a {what}: {error}. Write it with numpy.save(path, tokens) as "
                ".npy, or with tokens.tofile(path) as .bin and name its type with data.token_dtype."
            ) from error
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise DataError(
                f"{self.path} holds {array.dtype} numbers of shape {list(array.shape)}; tokens must be one "
                "flat array of integers. Write tokens.reshape(-1).astype('uint16')."
            )
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def check_ids(self, vocab_size: int) -> None:
        """Look for ids outside the vocabulary in up to a million tokens spread over the file.

        Raises:
            DataError: names the id found.
        """
        blocks = 16
        length = CHECKED_TOKENS // blocks
        starts = np.linspace(0, max(0, self.size - length), blocks).astype(np.int64)
        for start in np.unique(starts):
            block = self.array[start : start + length]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= vocab_size:
                given = f" stored as {self.dtype}" if self.path.suffix != ".npy" else ""
                raise DataError(
                    f"{self.path}{given} holds token id {low if low < 0 else high}, but data.vocab_size="
                    f"{vocab_size} allows 0 to {vocab_size - 1}. Use data.vocab_size={max(high + 1, 1)} or "
                    "more, or correct data.token_dtype if the ids look wrong."
                )


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
