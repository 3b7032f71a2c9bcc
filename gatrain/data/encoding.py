"""Bytes -> characters, exactly: what is not text of the stated encoding is refused with its place.

Nothing is ever replaced. UTF-16 and UTF-32 are noticed with and without a byte-order mark, and a mark at the
beginning of a file, or of a line where marked files were joined, is dropped and counted, since it is no text.
"""

from __future__ import annotations

import codecs
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gatrain.data.compressed import open_bytes
from gatrain.data.folders import shown
from gatrain.data.report import Omissions
from gatrain.errors import DataError, nearest

BLOCK_BYTES = 1 << 18
HEAD_BYTES = 1 << 14

MARK = "\ufeff"
MARKS_DROPPED = "byte-order marks dropped"

_MARKS = (  # those of UTF-32 first: that of UTF-16 begins one of them
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF8, "UTF-8", "utf-8"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16"),
)
_COMMON = (
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "ascii", "cp1252", "latin-1", "iso8859-15", "cp1250",
    "cp1251", "koi8-r", "gb18030", "gbk", "big5", "shift_jis", "cp932", "euc_jp", "euc_kr", "mac_roman",
)  # fmt: skip
_NOT_OF_FILES = frozenset({"idna", "punycode", "undefined", "mbcs", "oem"})
"""Codecs of host names, of no use, or that mean another thing on each machine."""
_MAY_GIVE_SURROGATES = frozenset({"utf-7", "unicode_escape", "raw_unicode_escape"})


def check_encoding(name: str) -> str:
    """Python's own name of the encoding ``name``.

    Raises:
        DataError: no text encoding; says which there are.
    """
    try:
        info = codecs.lookup(name)
        known = getattr(info, "_is_text_encoding", True) and info.incrementaldecoder is not None
    except (LookupError, TypeError, ValueError, UnicodeError):
        known = False
    if not known or info.name.replace("-", "_") in _NOT_OF_FILES:
        raise DataError(
            f"data.encoding={name} is not a text encoding of Python.{nearest(str(name), _COMMON)} Use utf-8, "
            "utf-16, cp1252 (Western Windows), latin-1, cp1251 (Cyrillic), gb18030 (Chinese), big5, shift_jis, "
            "euc_kr, or another of https://docs.python.org/3/library/codecs.html#standard-encodings"
        )
    return info.name


def decoded(file: Path, encoding: str, omissions: Omissions | None = None) -> Iterator[str]:
    """Yield the text of ``file``, unpacked and decoded, in blocks of bounded size; line ends stay as they are.

    Args:
        file: may be compressed, see `gatrain.data.compressed`.
        encoding: as `check_encoding` gives it.
        omissions: counts a byte-order mark that was dropped.

    Raises:
        DataError: unreadable, another encoding, or not text; names the file, the byte and the line.
    """
    with open_bytes(file) as stream:
        yield from _decoded(file, stream, encoding, omissions)


def _decoded(file: Path, stream: BinaryIO, encoding: str, omissions: Omissions | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    as_utf8 = None if encoding.startswith(("utf", "ascii")) else _AsUtf8()
    position, lines, at_line_start = 0, 0, True
    while True:
        block = stream.read(BLOCK_BYTES)
        if position == 0:
            check_head(file, block[:HEAD_BYTES], encoding)
        try:
            text = decoder.decode(block, final=not block)
            if encoding in _MAY_GIVE_SURROGATES:
                text.encode("utf-8")
        except UnicodeDecodeError as error:
            # the decoder keeps the beginning of a character that the last block ended in
            start = position + len(block) - len(error.object) + error.start
            line = lines + error.object[: error.start].count(b"\n") + 1
            raise DataError(_undecodable(file, encoding, start, line, error)) from None
        except UnicodeError as error:
            remedy = (
                "It has no byte-order mark: say data.encoding=utf-16-le or utf-16-be."
                if encoding in ("utf-16", "utf-32")
                else "Name its encoding with data.encoding=..."
            )
            raise DataError(f"{file} is not text in {encoding}: {error}. {remedy}") from None
        for sign, shows in _NO_TEXT.items():
            if sign in text:
                line = lines + text[: text.index(sign)].count("\n") + 1
                raise DataError(_not_text(file, f"{shows}, line {line}", encoding))
        position += len(block)
        lines += text.count("\n")
        if as_utf8 is not None and as_utf8.is_it_all(block):
            raise DataError(_other_encoding(file, "is UTF-8", "utf-8", encoding))
        if MARK in text:
            text, dropped = _without_marks(text, at_line_start)
            if omissions is not None and dropped:
                omissions.add(MARKS_DROPPED, shown(file.name), dropped)
        at_line_start = text.endswith("\n") if text else at_line_start
        if text:
            yield text
        if not block:
            return


def _without_marks(text: str, at_line_start: bool) -> tuple[str, int]:
    """Drop byte-order marks where a line begins: at a file's beginning, and where files were joined."""
    found = text.count(f"\n{MARK}")
    text = text.replace(f"\n{MARK}", "\n")
    if at_line_start and text.startswith(MARK):
        return text[1:], found + 1
    return text, found


_NO_TEXT = {
    "\0": "holds a null character",
    "\x1b$": "holds the escape sequences of ISO-2022 (data.encoding=iso2022_jp or iso2022_kr)",
}
_FEWEST_UTF8 = 4
"""Characters beyond ASCII that are needed to believe that a text is UTF-8: chance does not make so many."""


class _AsUtf8:
    """Watches whether a file in another encoding is UTF-8 to its end, which would be read wrongly and not fail."""

    def __init__(self) -> None:
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")("strict")
        self._beyond_ascii = 0

    def is_it_all(self, block: bytes) -> bool:
        """Take the next block; an empty one ends the file. True at the end, if all of it was UTF-8."""
        if self._decoder is None:
            return False
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            self._decoder = None
            return False
        self._beyond_ascii += 0 if text.isascii() else sum(not c.isascii() for c in text)
        return not block and self._beyond_ascii >= _FEWEST_UTF8


def check_head(file: Path, head: bytes, encoding: str) -> None:
    """Refuse a file whose beginning shows another encoding than ``encoding``, or no text.

    Raises:
        DataError: says which encoding it looks like.
    """
    mark = next(((name, codec) for mark, name, codec in _MARKS if head.startswith(mark)), None)
    if mark is not None:
        if not encoding.replace("_", "-").startswith(mark[1]):
            raise DataError(
                _other_encoding(file, f"begins with the byte-order mark of {mark[0]}", mark[1], encoding)
            )
        return
    if encoding.startswith(("utf-16", "utf-32")):
        return
    if (wide := wide_encoding(head)) is not None:
        raise DataError(
            _other_encoding(file, f"looks like {wide.upper()} without a byte-order mark", wide, encoding)
        )
    if b"\0" in head:
        raise DataError(_not_text(file, "holds null bytes", encoding))
    if encoding == "utf-8" and (wide := _hidden_utf16(head)) is not None:
        raise DataError(
            _other_encoding(file, f"looks like {wide.upper()} without a byte-order mark", wide, encoding)
            + " (If it is ASCII all the same: data.encoding=ascii.)"
        )
    control = sum(head.count(bytes([code])) for code in _CONTROL)
    if control > max(8, len(head) // 50) and not encoding.startswith(("iso2022", "cp")):
        raise DataError(
            _not_text(file, f"holds {control} control characters in its first {len(head)} bytes", encoding)
        )


_CONTROL = [*range(1, 7), *range(14, 27), 28, 29, 30, 31, 127]
"""Not among them: bell, backspace, tab, line ends, form feed and escape, which terminals' logs hold."""


def wide_encoding(head: bytes) -> str | None:
    """The encoding of 16 or 32 bits that the null bytes of ``head`` show, if they show one."""
    if len(head) < 4 or b"\0" not in head:
        return None
    whole = head[: len(head) // 4 * 4]
    for encoding, high, next_high in (("utf-32-le", 3, 2), ("utf-32-be", 0, 1)):
        if not max(whole[high::4]) and max(whole[next_high::4]) <= 16 and _decodes(whole, encoding):
            return encoding
    whole = head[: len(head) // 2 * 2]
    for encoding, high in (("utf-16-le", 1), ("utf-16-be", 0)):
        zeros, others = whole[high::2].count(0), whole[1 - high :: 2].count(0)
        if zeros * 20 >= len(whole) // 2 and others * 50 <= len(whole) // 2 and _decodes(whole, encoding):
            return encoding
    return _hidden_utf16(head)


def _hidden_utf16(head: bytes) -> str | None:
    """UTF-16 of Chinese, Japanese or Korean: nearly all characters are theirs, and hardly a byte is white space."""
    whole = head[: len(head) // 2 * 2]
    if len(whole) < 16 or sum(whole.count(space) for space in b" \n\t") * 25 > len(whole):
        return None
    if not head.isascii() and _decodes(head, "utf-8"):
        return None  # chance does not make valid UTF-8
    for encoding in ("utf-16-le", "utf-16-be"):
        text = whole.decode(encoding, errors="replace")
        asian = sum(
            "\u3040" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3" for c in text
        )
        marks = sum("\u3000" <= c < "\u3040" or "\uff00" <= c <= "\uffef" for c in text)
        # In ASCII the bytes of both places are alike; in UTF-16 those of one place tell the script.
        first, second = Counter(whole[::2]), Counter(whole[1::2])
        if (
            asian >= 0.5 * len(text)
            and asian + marks >= 0.8 * len(text)
            and (first - second).total() >= 0.6 * len(text)
        ):
            return encoding
    return None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)("strict").decode(data, final=False)
    except UnicodeError:
        return False
    return True


def _undecodable(file: Path, encoding: str, start: int, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start : error.start + 1]
    what = f"0x{byte[0]:02x} is not {encoding}" if byte else f"not {encoding}"
    if error.reason.startswith(("unexpected end", "truncated", "incomplete")):
        what = "it ends in the middle of a character"
    likely = _hidden_utf16(error.object[:HEAD_BYTES]) if encoding == "utf-8" else None
    if encoding != "utf-8" and _decodes(error.object[:HEAD_BYTES], "utf-8"):
        likely = "utf-8"
    guess = (
        f"It looks like {likely.upper()}: data.encoding={likely}."
        if likely is not None
        else "Say which encoding it has, such as data.encoding=cp1252 (Western Windows), cp1251 (Cyrillic), "
        "gb18030 (Chinese) or shift_jis (Japanese), or correct the file; nothing is replaced in silence."
    )
    return f"{file}, byte {start} (line {line}): {what} ({error.reason}). {guess}"


def _other_encoding(file: Path, shows: str, codec: str, encoding: str) -> str:
    return (
        f"{file} {shows}, but is to be read as {encoding}. Use data.encoding={codec}, or convert it: "
        f"iconv -f {codec.upper()} -t UTF-8 {shlex.quote(str(file))} > "
        f"{shlex.quote(str(file.with_stem(file.stem + '_utf8')))}"
    )


def _not_text(file: Path, why: str, encoding: str) -> str:
    return (
        f"{file} is not a text file in {encoding}: it {why}. Name the text files only, for example "
        f"data.path='{file.parent}/**/*.txt', or its encoding with data.encoding=...; token files end in .bin or "
        ".npy."
    )
