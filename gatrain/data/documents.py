"""Text on disk -> a stream of pieces of text, in bounded memory.

A document is a text file, or one record of a file of records (JSON Lines, JSON, CSV, TSV, parquet). Long documents
come in pieces, cut at a line's end, so that a file larger than memory is read like any other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gatrain.data.encoding import MARK, MARKS_DROPPED, decoded
from gatrain.data.folders import shown, unreadable
from gatrain.data.formats import KIND_NAMES, Reading, format_of
from gatrain.data.records import records, text_of
from gatrain.data.report import Omissions
from gatrain.errors import DataError

PIECE_CHARS = 1 << 18
TRAINING_CHARS = 200_000_000
"""Text that a tokenizer is trained on, at most, taken evenly from the whole."""

MOST_REFUSED = 20
"""Files that are no text and that are looked for, to name more than the first."""

EMPTY_FILES = "empty files"
EMPTY_DOCUMENTS = "empty documents"
MARKS_KEPT = "zero-width no-break spaces (U+FEFF) within texts, kept"
REPLACED_BEFORE = "replacement characters (U+FFFD) that the texts hold already, kept"
NULLS_KEPT = "null characters within texts, kept"
C1_KEPT = "control characters U+0080 to U+009F, kept (cp1252 gives them where it is read as latin-1)"
_C1 = re.compile("[\x80-\x84\x86-\x9f]")


def files_state(files: Sequence[Path]) -> list[list[Any]]:
    """Names, sizes and times of change: differs when a file does, without reading any.

    Raises:
        DataError: a file cannot be read.
    """
    found = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        found.append([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return found


class Corpus:
    """Files that are read as text, and what was met in them.

    Args:
        files: in the order in which they are read.
        reading: how.
        fields: further names of columns that show a table, see `format_of`.

    Attributes:
        formats: what each file is.
        documents: documents that were read in the last pass that counted.
        omissions: what was left out in it.

    Raises:
        DataError: a file that is no text.
    """

    def __init__(self, files: Sequence[Path], reading: Reading, fields: Sequence[str] = ()) -> None:
        self.files = list(files)
        self.reading = reading
        self.formats = self._formats(fields)
        self.documents = 0
        self.omissions = Omissions()

    def _formats(self, fields: Sequence[str]) -> dict[Path, str]:
        found: dict[Path, str] = {}
        refused: list[tuple[Path, DataError]] = []
        for file in self.files:
            try:
                found[file] = format_of(file, self.reading, fields)
            except DataError as error:
                refused.append((file, error))
                if len(refused) > MOST_REFUSED:
                    break
        if refused:
            others = ", ".join(short_name(file) for file, _ in refused[1:4])
            more = f"{len(refused) - 1}{' or more' if len(refused) > MOST_REFUSED else ''}"
            few = f" Nor can {more} further files be read: {others}." if others else ""
            raise DataError(f"{refused[0][1]}{few}")
        return found

    @property
    def kind(self) -> str:
        """Such as ``JSON Lines`` or ``3 text files, 1 CSV``."""
        counts = Counter(KIND_NAMES[self.formats[file]] for file in self.files)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {kind}" for kind, count in counts.items())

    def pieces(self, counted: bool = True) -> Iterator[tuple[str, bool]]:
        """Yield (piece of text, whether it ends its document) over all documents.

        Args:
            counted: count documents and omissions, which a second pass must not do again.
        """
        omissions = self.omissions if counted else Omissions()
        for file in self.files:
            for text, is_end in pieces(file, self.reading, omissions, self.formats[file]):
                self.documents += counted and is_end
                yield text, is_end

    def training_texts(self) -> Iterator[str]:
        """The text to train a tokenizer on: everything, or every n-th piece of a large corpus."""
        total = sum(file.stat().st_size for file in self.files)
        step = -(-total // TRAINING_CHARS) or 1
        return islice((text for text, _ in self.pieces(counted=False)), 0, None, step)


def pieces(
    file: Path, reading: Reading | None = None, omissions: Omissions | None = None, format: str | None = None
) -> Iterator[tuple[str, bool]]:
    """Yield (piece of text, whether it ends its document) over all documents of ``file``.

    Raises:
        DataError: unreadable, not text or in another encoding; a record that is broken or lacks its text.
    """
    reading = reading or Reading()
    omissions = omissions if omissions is not None else Omissions()
    format = format or format_of(file, reading)
    name, any_text = short_name(file), False
    if format == "text":
        for piece, is_end in _cut_lines(decoded(file, reading.encoding, omissions)):
            any_text = True
            _count_oddities(piece, name, reading.encoding, omissions)
            yield piece, is_end
    else:
        for place, record in records(file, format, reading, omissions, (reading.text_field,)):
            any_text = True
            text = text_of(record, reading.text_field, file, place, "data.text_field")
            if text.startswith(MARK):
                text = text[1:]
                omissions.add(MARKS_DROPPED, f"{name}, {place}")
            if not text:
                omissions.add(EMPTY_DOCUMENTS, f"{name}, {place}")
            _count_oddities(text, f"{name}, {place}", reading.encoding, omissions)
            yield from _cut(text)
    if not any_text:
        omissions.add(EMPTY_FILES, name)


def short_name(file: Path) -> str:
    """A file's name with its folder's, for lists."""
    return shown("/".join(file.parts[-2:]))


def _count_oddities(text: str, place: str, encoding: str, omissions: Omissions) -> None:
    if "\0" in text:
        omissions.add(NULLS_KEPT, place, text.count("\0"))
    if text.isascii():
        return
    for character, what in ((MARK, MARKS_KEPT), ("\ufffd", REPLACED_BEFORE)):
        if count := text.count(character):
            omissions.add(what, place, count)
    if encoding.startswith("iso8859") and (count := len(_C1.findall(text))):  # a slow search, so only here
        omissions.add(C1_KEPT, place, count)


def _cut_lines(blocks: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Cut a stream of text into pieces of bounded size, at line ends where there are any."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > 2 * PIECE_CHARS:
            end = held.find("\n", PIECE_CHARS, 2 * PIECE_CHARS) + 1 or 2 * PIECE_CHARS
            yield held[:end], False
            held = held[end:]
    if held:
        yield held, True


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Cut one document in memory into pieces of bounded size, at line ends where there are any."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        cut = text.rfind("\n", start, start + PIECE_CHARS) + 1
        end = cut if cut > start else start + PIECE_CHARS
        yield text[start:end], False
        start = end
    if text:
        yield text[start:], True
