"""Files of records (JSON Lines, JSON, CSV, TSV, parquet) -> one mapping a record, with its place for messages.

Every record is read or the file is refused; blank lines are counted. Memory holds one record, or one batch of rows.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gatrain.data.compressed import plain_name
from gatrain.data.encoding import decoded
from gatrain.data.folders import shown, unreadable
from gatrain.data.formats import Reading, table_delimiter
from gatrain.data.report import Omissions
from gatrain.errors import DataError, nearest

MAX_RECORD_CHARS = 1 << 28
"""A longer line or record is refused: it would have to be held in memory, several times over."""
PARQUET_ROWS = 256
BLANK_LINES = "blank lines left out"
LONG_ROWS = "rows of several lines, by quoted line ends"
CHAT_FIELDS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")

Record = dict[str, Any]


def records(
    file: Path,
    format: str,
    reading: Reading,
    omissions: Omissions | None = None,
    columns: tuple[str, ...] = (),
) -> Iterator[tuple[str, Record]]:
    """Yield (place such as ``line 7``, record) of a file.

    Args:
        format: as `gatrain.data.formats.format_of` gives it, but not ``text``.
        columns: of a parquet file, read no others.

    Raises:
        DataError: names the file and the record that cannot be read.
    """
    if format == "parquet":
        yield from _parquet(file, columns)
        return
    blocks = decoded(file, reading.encoding, omissions)
    if format == "jsonl":
        yield from _json_lines(file, blocks, omissions)
    elif format == "json":
        yield from _json_values(file, blocks, reading)
    else:
        yield from _table(file, blocks, reading, "\t" if format == "tsv" else None, omissions)


def text_of(record: Record, field: str, file: Path, place: str, option: str) -> str:
    """The text in ``record[field]``; ``a.b`` is field ``b`` of ``a``, unless there is a field ``a.b``.

    Raises:
        DataError: no such field, or not text; names the file, the place, the fields that are there, and the option
            that chooses another.
    """
    value, found = _find(record, field)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}, {place}: field '{field}' holds half a character (the lone surrogate "
                f"\\u{ord(value[error.start]):04x}, character {error.start + 1}), which is no text. "
                "Correct or delete "
                "that record; an emoji needs both halves."
            ) from None
        return value
    there = ", ".join(map(repr, field_names(record)[:20])) or "no fields"
    similar = "" if found else nearest(field, field_names(record))
    what = f"has no field '{field}'" if not found else f"field '{field}' is not a string"
    if found:
        what += " but null" if value is None else f" but {_json_type(value)}"
    chat = next((name for name in CHAT_FIELDS if isinstance(record.get(name), list)), None)
    if chat is not None and not found:
        raise DataError(
            f"{file}, {place}: it holds a chat in '{chat}', and how its turns become text is not known here. Write "
            '{"text": ...} for each with your template, for example tokenizer.apply_chat_template('
            f'record[\'{chat}\'], tokenize=False), or {{"prompt": ..., "completion": ...}} for recipe=padded.'
        )
    of_pairs = option == "data.text_field" and {"prompt", "completion"} <= record.keys()
    hint = " Pairs of prompt and completion are read by recipe=padded." if of_pairs else ""
    raise DataError(
        f"{file}, {place}: {what}; it has {there}.{shown(similar)} Name the field with "
        f"{option}=... "
        f"({option}=a.b for a field b in a), or correct that record.{hint}"
    )


def _find(record: Record, field: str) -> tuple[Any, bool]:
    if field in record:
        return record[field], True
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return None, False
        value = value[part]
    return value, True


def has_field(record: Record, field: str) -> bool:
    """Whether `text_of` would find the field, be it text or not."""
    return _find(record, field)[1]


def field_names(record: Record) -> list[str]:
    """Names of fields, dotted where they are in a field."""
    found: list[str] = []
    for key, value in record.items():
        found += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) and value else [str(key)]
    return found


def _json_type(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


# --- JSON -----------------------------------------------------------------------------------------------


def _lines(file: Path, blocks: Iterator[str]) -> Iterator[str]:
    """Lines with their ends (``\\n``), whole, each of bounded length."""
    rest: list[str] = []
    held, number = 0, 1
    for block in blocks:
        *whole, last = block.split("\n")
        for line in whole:
            rest.append(line + "\n")
            yield "".join(rest)
            rest, held, number = [], 0, number + 1
        rest.append(last)
        held += len(last)
        if held > MAX_RECORD_CHARS:
            raise DataError(
                f"{file}, line {number}: longer than {MAX_RECORD_CHARS:,} characters, too long for one "
                "record. If it "
                "is plain text, say data.format=text."
            )
    if last_line := "".join(rest):
        yield last_line


def _json_lines(
    file: Path, blocks: Iterator[str], omissions: Omissions | None
) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_lines(file, blocks), 1):
        if not line.strip():
            if omissions is not None:
                omissions.add(BLANK_LINES, f"{shown(file.name)}, line {number}")
            continue
        place = f"line {number}"
        try:
            record = _DECODER.decode(line.strip())
        except (ValueError, RecursionError) as error:
            plain = "" if plain_name(file).suffix in JSONL_SUFFIXES else f" {_PLAIN}"
            raise DataError(
                f"{file}, {place}: not valid JSON ({_why(error)}). {_CORRECT_LINE}{plain}"
            ) from None
        yield place, _record(record, file, place)


def _json_values(file: Path, blocks: Iterator[str], reading: Reading) -> Iterator[tuple[str, Record]]:
    """The elements of one array, or objects one after the other, with any white space between them."""
    text = _Growing(file, blocks)
    is_array = text.peek() == "["
    if is_array:
        text.take(1)
    number = 0
    while True:
        following = text.peek()
        if is_array and following == "]" and not text.after_comma:
            text.take(1)
            break
        if following == "" and not is_array:
            return
        number += 1
        value = text.value(f"record {number}")
        place = f"record {number}"
        if isinstance(value, str) and is_array:
            value = {reading.text_field: value}
        yield place, _record(value, file, place)
        text.after_comma = False
        if is_array and text.peek() == ",":
            text.take(1)
            text.after_comma = True
        elif is_array and text.peek() != "]":
            raise DataError(
                f"{file}, after record {number}: not valid JSON (expected a comma or the end of the array)."
            )
    if text.peek():
        raise DataError(
            f"{file}: something follows the end of its JSON array. Give one array, or one object a line."
        )


class _Growing:
    """Text of which the beginning is dropped as it is parsed, and the end read as it is needed."""

    def __init__(self, file: Path, blocks: Iterator[str]) -> None:
        self._file, self._blocks = file, blocks
        self._text, self._at = "", 0
        self.after_comma = False

    def _more(self, least: int = 0) -> bool:
        parts = [self._text[self._at :]]
        grown = 0
        for block in self._blocks:
            parts.append(block)
            grown += len(block)
            if grown >= least:
                break
        self._text, self._at = "".join(parts), 0
        return grown > 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            match = _WHITESPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, count: int) -> None:
        self._at += count

    def value(self, place: str) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():
                    self._at = min(end, len(self._text)) if end <= len(self._text) else end
                    return value
                continue  # a number may go on in what follows
            except (ValueError, RecursionError) as error:
                held = len(self._text) - self._at
                near_end = not isinstance(error, json.JSONDecodeError) or error.pos >= len(self._text) - 16
                is_open = near_end or str(error).startswith("Unterminated string")
                if held > MAX_RECORD_CHARS or not is_open or not self._more(held):
                    raise DataError(
                        f"{self._file}, {place}: not valid JSON ({_why(error)}). Correct or delete that "
                        "record; plain "
                        "text that only begins like JSON is read with data.format=text."
                    ) from None


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_WHITESPACE = re.compile(r"[ \t\n\r]*")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_PLAIN = "Plain text that only begins like JSON is read with data.format=text."
_CORRECT_LINE = "Correct or delete that line."


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _record(value: Any, file: Path, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f'{file}, {place}: expected a JSON object such as {{"text": "..."}}, found {type(value).__name__}. '
            "Correct or delete that line; plain text that only begins like JSON is read with data.format=text."
        )
    return value


# --- tables ---------------------------------------------------------------------------------------------

_DELIMITER_LINE = re.compile(r'"?sep=(.)"?\r?\n')
"""What Excel may write above the names: no row."""
_OLD_LINE_END = re.compile(r"\r(?!\n|\Z)")


def _table(
    file: Path, blocks: Iterator[str], reading: Reading, delimiter: str | None, omissions: Omissions | None
) -> Iterator[tuple[str, Record]]:
    """Rows as RFC 4180 has them: fields in double quotes may hold delimiters, line ends and doubled quotes."""
    first = next(blocks, "")
    if (said := _DELIMITER_LINE.match(first)) is not None:
        delimiter, first = said[1], first[said.end() :]
    lines_above = 0 if said is None else 1
    if delimiter is None:
        fields = {reading.text_field, "prompt", "completion"}
        delimiter = table_delimiter(first[: 1 << 14].split("\n"), fields) or ","
    csv.field_size_limit(min(MAX_RECORD_CHARS, sys.maxsize))
    rows = csv.reader(_lines(file, _chained(first, blocks)), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = lines_above + rows.line_num + 1
        place = f"line {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if _OLD_LINE_END.search(first):
                raise DataError(
                    f"{file}: its lines end with a carriage return alone, as of old Macs. Write line feeds: "
                    f"tr '\\r' '\\n' < {shlex.quote(str(file))} > NEW"
                ) from None
            raise DataError(
                f"{file}, {place}: not valid {'TSV' if delimiter == chr(9) else 'CSV'} ({error}). "
                "Correct the quotes of "
                'that row (a quote inside a field is written ""), or say data.format=text to read it as it stands.'
            ) from None
        if not row:
            if omissions is not None:
                omissions.add(BLANK_LINES, f"{shown(file.name)}, {place}")
            continue
        if names is None:
            names = [name.strip() for name in row]
            _check_header(file, names)
            continue
        if len(row) != len(names):
            raise DataError(
                f"{file}, {place}: {len(row)} columns under {len(names)} names "
                f"({shown(', '.join(names[:10]))}). Correct that "
                "row (a field with a delimiter or a line end stands in double quotes), or say data.format=text."
            )
        if lines_above + rows.line_num > number and omissions is not None:
            omissions.add(LONG_ROWS, f"{shown(file.name)}, {place}")
        yield place, dict(zip(names, row, strict=True))


def _check_header(file: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"{file}: its first line names the column {twice!r} twice. Give each column its own name."
        )


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{file} is a parquet file, which needs pyarrow. Run: pip install pyarrow (or write its "
            "texts as .jsonl)."
        ) from None
    number = 0

    def failed(error: Exception) -> DataError:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return DataError(
            f"{file}, after row {number}: not a whole parquet file ({why}). Download or write it again."
        )

    try:
        stream = file.open("rb")  # not its name, which pyarrow wants to be UTF-8
    except OSError as error:
        raise unreadable(file, error) from error
    with stream:
        try:
            table = parquet.ParquetFile(stream)
        except Exception as error:  # pyarrow's are ValueErrors, OSErrors and others
            raise failed(error) from None
        there = table.schema_arrow.names
        wanted = [
            name for name in there if name in columns or name in {each.split(".")[0] for each in columns}
        ]
        if (twice := next((name for name in wanted if there.count(name) > 1), None)) is not None:
            raise DataError(f"{file} has two columns called {twice!r}. Give each column its own name.")
        chosen = wanted or None  # none of them: the first row's error names what is there
        batches = table.iter_batches(batch_size=PARQUET_ROWS, columns=chosen)
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except Exception as error:
                raise failed(error) from None
            if batch is None:
                return
            for row in rows:
                number += 1
                yield f"row {number}", row
