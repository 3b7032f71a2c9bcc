"""How a token file stores its numbers: by its header where it has one of a known kind, else as the user says.

Known are ``.npy``; the ``.bin`` files of llm.c, modded-nanogpt and nanochat's forebears (a header of 256 int32, of
which the first is a magic number); and Megatron's ``.bin`` with its ``.idx`` beside it. All others are raw.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gatrain.data.compressed import kind_of_compression
from gatrain.data.folders import unreadable
from gatrain.errors import DataError, nearest

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64", "uint8")

Array = npt.NDArray[Any]

_HEADER_BYTES = 1024
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Magic number -> version and type of the numbers, of llm.c's and modded-nanogpt's shards."""
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16", 9: "uint32",
}  # fmt: skip
_WRITE = "Write it with numpy.save(path, tokens) as .npy, or with tokens.tofile(path) as .bin and data.token_dtype."


@dataclass(frozen=True)
class Layout:
    """``size`` numbers of type ``dtype`` from byte ``offset`` on; ``kind`` is ``raw``, ``npy``, ``llm.c`` or
    ``Megatron``."""

    dtype: np.dtype[Any]
    offset: int
    size: int
    kind: str


def layout(path: Path, dtype: str) -> Layout:
    """Find out how ``path`` stores its tokens.

    Args:
        dtype: one of `TOKEN_DTYPES`, for files that do not say it themselves.

    Raises:
        DataError: missing, empty, cut off, or something else than tokens.
    """
    if dtype not in TOKEN_DTYPES:
        raise DataError(
            f"data.token_dtype={dtype} is not one of {', '.join(TOKEN_DTYPES)}.{nearest(str(dtype), TOKEN_DTYPES)}"
        )
    if not path.is_file():
        raise DataError(f"{path} is not there or is not a file. Give a token file ending in .bin or .npy.")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise unreadable(path, error) from error
    if size == 0:
        raise DataError(f"{path} is empty. Give a file with tokens in it.")
    if path.suffix.lower() == ".npy":
        found = _npy(path, head, size)
    else:
        _check_no_other(path, head)
        found = _megatron(path, size) or _llm_c(path, head, size) or _raw(path, dtype, size)
    if found.size == 0:
        raise DataError(f"{path} is empty: it holds a header and no token. Give a file with tokens in it.")
    return found


def _raw(path: Path, dtype: str, size: int) -> Layout:
    each = np.dtype(dtype)
    if size % each.itemsize:
        raise DataError(
            f"cannot read {path} as a sequence of {dtype} numbers: its {size:,} bytes are no multiple of "
            f"{each.itemsize}. It is cut off, or its numbers are of another type: name it with data.token_dtype "
            f"({', '.join(TOKEN_DTYPES)})."
        )
    return Layout(each, 0, size // each.itemsize, "raw")


def _check_no_other(path: Path, head: bytes) -> None:
    what = None
    if (packed := kind_of_compression(head)) is not None:
        what = f"compressed with {packed}: unpack it, since token files are read in place"
    elif head.startswith(b"PK\x03\x04"):
        what = "a zip archive, such as a model saved by PyTorch. Name the token files only"
    elif head.startswith(b"\x93NUMPY"):
        what = "a NumPy array: rename it to .npy"
    elif head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        what = "a pickle, such as a model's weights. Name the token files only"
    elif head.startswith(b"\x7fELF"):
        what = "a program. Name the token files only"
    elif len(head) >= 16 and _is_ascii_text(head):
        what = "plain text, not token ids: rename it to .txt and it is tokenised"
    elif _is_lit_data(path):
        what = "a chunk of LitData, with an index.json beside it: write its tokens as one flat array"
    if what is not None:
        raise DataError(f"{path} is {what}.")


def _is_ascii_text(head: bytes) -> bool:
    return not head.translate(None, bytes([9, 10, 12, 13, *range(32, 127)]))


def _is_lit_data(path: Path) -> bool:
    index = path.with_name("index.json")
    try:
        with index.open("rb") as stream:
            return path.name.startswith("chunk-") and b'"chunks"' in stream.read(1 << 20)
    except OSError:
        return False


def _llm_c(path: Path, head: bytes, size: int) -> Layout | None:
    if len(head) < _HEADER_BYTES:
        return None
    magic, version, count = struct.unpack("<3i", head[:12])
    big_magic, *_ = struct.unpack(">i", head[:4])
    if big_magic in _LLM_C:
        raise DataError(
            f"{path} has llm.c's header in the other byte order (big-endian). Write it little-endian."
        )
    if 20240500 <= magic <= 20241231 and magic not in _LLM_C and not any(head[64:_HEADER_BYTES]):
        raise DataError(
            f"{path} has a header of llm.c with the magic number {magic}, which is no file of tokens. Known are "
            f"{', '.join(map(str, _LLM_C))}."
        )
    if magic not in _LLM_C:
        return None
    known, name = _LLM_C[magic]
    if version != known:
        raise DataError(
            f"{path} has a header of llm.c (magic {magic}) of version {version}; version {known} is "
            "known. Write the "
            "tokens with numpy.save instead."
        )
    dtype = np.dtype(name)
    held = size - _HEADER_BYTES
    if count < 0 or held != count * dtype.itemsize:
        raise DataError(
            f"{path}: its header (magic {magic}) tells {count:,} tokens of {dtype.name}, but {held:,} "
            "bytes follow it, "
            f"enough for {held // dtype.itemsize:,}. It is cut off or damaged; download or write it again."
        )
    return Layout(dtype, _HEADER_BYTES, count, "llm.c")


def _megatron(path: Path, size: int) -> Layout | None:
    index = path.with_suffix(".idx")
    try:
        with index.open("rb") as stream:
            head = stream.read(34)
            if not head.startswith(_MEGATRON_MAGIC):
                return None
            if len(head) < 34:
                raise DataError(f"{index} is cut off. Write it again beside {path.name}.")
            version, code, count, _ = struct.unpack("<QBQQ", head[9:])
            if version != 1 or code not in _MEGATRON_DTYPES or _MEGATRON_DTYPES[code].startswith("float"):
                raise DataError(
                    f"{index}: a Megatron index of version {version} with numbers of type {code}, of "
                    "which version 1 "
                    f"with integers is known. Write the tokens with numpy.save instead."
                )
            if index.stat().st_size < 34 + 12 * count:
                raise DataError(f"{index} is cut off: it tells {count:,} sequences. Write it again.")
            total = 0
            left = count
            while left:
                lengths = np.frombuffer(stream.read(4 * min(left, 1 << 20)), dtype="<i4")
                if lengths.size == 0 or int(lengths.min()) < 0:
                    raise DataError(f"{index} is damaged: lengths that are no lengths. Write it again.")
                total, left = total + int(lengths.sum(dtype=np.int64)), left - lengths.size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(index, error) from error
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    if total * dtype.itemsize != size:
        raise DataError(
            f"{path} has {size:,} bytes, but {index.name} tells {total:,} tokens of {dtype.name}. The "
            "two do not belong "
            "together, or one is cut off."
        )
    return Layout(dtype, 0, total, "Megatron")


def _npy(path: Path, head: bytes, size: int) -> Layout:
    """By NumPy's own reader of headers, which opens no pickle."""
    from numpy.lib import format as npy

    def bad(why: str) -> DataError:
        return DataError(f"cannot read {path} as a .npy array: {why}. {_WRITE}")

    if not head.startswith(npy.MAGIC_PREFIX):
        what = "it is a .npz archive" if head.startswith(b"PK") else "it does not begin like one"
        raise bad(what)
    try:
        with path.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
            offset = stream.tell()
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise bad(str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from None
    except OSError as error:
        raise unreadable(path, error) from error
    if len(shape) != 1 or dtype.kind not in "ui":
        raise DataError(
            f"{path} holds {dtype} numbers of shape {list(shape)}; tokens must be one flat array of integers. "
            "Write tokens.reshape(-1).astype('uint16')."
        )
    held = size - offset
    if shape[0] < 0 or held != shape[0] * dtype.itemsize:
        raise DataError(
            f"{path}: its header tells {shape[0]:,} numbers of {dtype.name}, but {held:,} bytes follow "
            "it, enough for "
            f"{held // dtype.itemsize:,}. It is cut off or holds several arrays; write it again."
        )
    return Layout(dtype, offset, int(shape[0]), "npy")


def beside(path: Path) -> Path | None:
    """The index that belongs to a token file and is no data of its own."""
    index = path.with_suffix(".idx")
    return index if os.path.isfile(index) else None
