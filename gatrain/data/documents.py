"""Text on disk -> a stream of pieces of text, in bounded memory.

A document is a text file or one line of a JSON Lines file. Long documents come in pieces, cut at a line's
end, so that a file larger than memory is read like any other.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gatrain.errors import DataError, nearest

PIECE_CHARS = 1 << 18
JSONL_SUFFIXES = (".jsonl", ".ndjson")


def find_files(path: str) -> list[Path]:
    """The files that ``data.path`` names: one file, a folder (all files below it), or a glob pattern; sorted.

    Hidden files and folders are left out of folders.

    Raises:
        DataError: nothing is there.
    """
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded.resolve()]
    if expanded.is_dir():
        found = [
            file
            for file in expanded.resolve().rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(expanded.resolve()).parts)
        ]
        if not found:
            raise DataError(f"data.path={path} is a folder with no files in it. Put text files there.")
        return sorted(found)
    matches = sorted(Path(name).resolve() for name in glob.glob(str(expanded), recursive=True))
    found = [file for file in matches if file.is_file()]
    if not found:
        raise DataError(
            f"data.path={path} does not exist.{_similar(expanded)} Give a text file, a folder of text "
            "files, a pattern such as 'texts/**/*.md' (in quotes), a .jsonl file, or a token file (.bin or "
            ".npy)."
        )
    return found


def files_fingerprint(files: list[Path]) -> list[list[Any]]:
    """Names, sizes and modification times: changes when a file does, without reading any.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        stats = [(file, file.stat()) for file in files]
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the operating system refuses to read."""
    return DataError(f"cannot read {path}: {error.strerror or error}. Check the file and its permissions.")


def pieces(file: Path, text_field: str = "text") -> Iterator[tuple[str, bool]]:
    """Yield (piece of text, whether it ends its document) over all documents of ``file``.

    Raises:
        DataError: unreadable or binary file; a line of JSON that is broken or lacks ``text_field``.
    """
    if file.suffix.lower() in JSONL_SUFFIXES:
        for number, record in json_lines(file):
            text = string_field(record, text_field, file, number, "data.text_field")
            yield from _cut(text)
        return
    check_is_text(file)
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            piece = ""
            while block := stream.read(PIECE_CHARS):
                if piece:  # now it is known that the one before was not the last
                    yield piece, False
                # Go on to the end of the line, unless the line is endless.
                piece = block + stream.readline(PIECE_CHARS)
            if piece:
                yield piece, True
    except OSError as error:
        raise unreadable(file, error) from error


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line that is not blank.

    Raises:
        DataError: names the file and the line that is not a JSON object.
    """
    number = 0
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(
                        f"{file}, line {number}: expected a JSON object such as "
                        f'{{"text": "..."}}, found {type(record).__name__}. Correct or delete that line.'
                    )
                yield number, record
    except ValueError as error:  # broken JSON, and bytes that are not UTF-8
        raise DataError(
            f"{file}, line {number}: not valid JSON ({error}). Correct or delete that line."
        ) from None
    except OSError as error:
        raise unreadable(file, error) from error


def string_field(
    record: dict[str, Any], field: str, file: Path, number: int, option: str | None = None
) -> str:
    """``record[field]``, which must be a string.

    Raises:
        DataError: names the file, the line, the fields that are there, and the option that chooses another,
            if any.
    """
    value = record.get(field)
    if not isinstance(value, str):
        what = f"has no field '{field}'" if field not in record else f"field '{field}' is not a string"
        raise DataError(
            f"{file}, line {number}: {what}; it has {', '.join(map(repr, record)) or 'no fields'}."
            f"{nearest(field, record)} "
            f"{f'Name the field with {option}=..., or correct' if option else 'Correct'} that line."
        )
    return value


def check_is_text(file: Path) -> None:
    """Refuse a file that starts like a binary one.

    Raises:
        DataError: a null byte was found near the start, or the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(8192)
    except OSError as error:
        raise unreadable(file, error) from error
    if b"\0" in head:
        raise DataError(
            f"{file} is not a text file (it holds null bytes). Name the text files only, for example "
            f"data.path='{file.parent}/**/*.txt'; token files end in .bin or .npy."
        )


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


def _similar(path: Path) -> str:
    try:
        return nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""
