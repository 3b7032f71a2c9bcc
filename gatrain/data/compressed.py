"""Files as bytes, unpacked where they are compressed (gzip, bzip2, xz, Zstandard), in bounded memory.

What a file is, its first bytes say, not its name. Every member is read to its end and its checksum; anything that
follows and is no further member is refused, never skipped.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from gatrain.data.folders import unreadable
from gatrain.errors import DataError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zstd": "Zstandard"}
_READ_BYTES = 1 << 16


class _Decompressor(Protocol):
    """As in the standard library's `bz2`, `lzma` and `compression.zstd`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = len(out) < max_length and not self._inner.unconsumed_tail
        return out


def kind_of_compression(head: bytes) -> str | None:
    """``gzip``, ``bzip2``, ``xz`` or ``Zstandard``, by the first bytes of a file."""
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh") and head[3:4] in b"123456789" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return "Zstandard"
    return None


def plain_name(file: Path) -> Path:
    """The name without the suffix of a compression: ``a.jsonl.gz`` -> ``a.jsonl``."""
    return file.with_suffix("") if file.suffix.lower() in SUFFIXES else file


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open ``file`` for reading, unpacked.

    Raises:
        DataError: unreadable; not what its name says; a damaged or truncated archive; a library that is missing.
    """
    try:
        with file.open("rb") as stream:
            kind = kind_of_compression(stream.read(16))
            stream.seek(0)
            named = SUFFIXES.get(file.suffix.lower())
            if named is not None and kind is None and file.stat().st_size:
                raise DataError(
                    f"{file} is called {file.suffix} but is not compressed with {named}. Name it after what it is, "
                    "or download it again."
                )
            if kind is None:
                yield stream
                return
            with io.BufferedReader(_Unpacked(file, stream, kind), 1 << 18) as unpacked:
                if kind_of_compression(unpacked.peek(16)[:16]) is not None:
                    raise DataError(f"{file} is compressed twice. Unpack it once: {_command(file, kind)}.")
                yield cast(BinaryIO, unpacked)
    except OSError as error:
        raise unreadable(file, error) from error


class _Unpacked(io.RawIOBase):
    """All members of a compressed file, one after the other."""

    def __init__(self, file: Path, stream: BinaryIO, kind: str) -> None:
        self._file, self._stream, self._kind = file, stream, kind
        self._new = _decompressors(file, kind)
        self._inner = self._new()
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        while not self._ended:
            if self._inner.eof:
                self._next_member()
                continue
            block = b""
            if self._inner.needs_input:
                block = self._stream.read(_READ_BYTES)
                if not block:
                    raise DataError(
                        f"{self._file} is cut off: it ends in the middle of its {self._kind} data. "
                        "Download or copy it again."
                    )
            try:
                data = self._inner.decompress(block, size)
            except Exception as error:  # each library has its own
                raise self._damaged(str(error)) from None
            if data:
                return data
        return b""

    def _next_member(self) -> None:
        rest = self._inner.unused_data or self._stream.read(_READ_BYTES)
        while rest and not rest.strip(b"\0"):  # padding, as tapes have it
            rest = self._stream.read(_READ_BYTES)
        if not rest:
            self._ended = True
            return
        rest += self._stream.read(16)
        if kind_of_compression(rest[:16]) != self._kind:
            raise self._damaged(f"{len(rest)} bytes or more follow its end and are no {self._kind} data")
        self._inner = self._new()
        self._stream.seek(self._stream.tell() - len(rest))

    def _damaged(self, why: str) -> DataError:
        return DataError(
            f"{self._file} is damaged, near byte {self._stream.tell()}: {why}. Download or copy it again "
            f"(to check it: {_command(self._file, self._kind, 'test')})."
        )


def _decompressors(file: Path, kind: str) -> Callable[[], _Decompressor]:
    if kind == "gzip":
        return _Gzip
    if kind == "bzip2":
        import bz2

        return bz2.BZ2Decompressor
    if kind == "xz":
        import lzma

        return lzma.LZMADecompressor
    try:
        try:
            from compression.zstd import ZstdDecompressor
        except ImportError:  # Python 3.13 and older
            from backports.zstd import ZstdDecompressor
    except ImportError:
        raise DataError(
            f"{file} is compressed with Zstandard, which this Python cannot read. Run: pip install backports.zstd "
            f"(or unpack it: {_command(file, kind)})."
        ) from None
    return cast(Callable[[], _Decompressor], ZstdDecompressor)


def _command(file: Path, kind: str, what: str = "decompress") -> str:
    import shlex

    program = {"gzip": "gzip", "bzip2": "bzip2", "xz": "xz", "Zstandard": "zstd"}[kind]
    return f"{program} --{what} --keep {shlex.quote(str(file))}"
