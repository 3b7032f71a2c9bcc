"""What a file is, by its first bytes and its name: text, records (JSON, CSV, parquet), or nothing to tokenise.

Records are never tokenised as prose, and what is no text is refused with what to do. ``data.format`` overrides the
guess: with ``text``, files of markup, JSON or commas are read as they stand.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gatrain.data.compressed import open_bytes, plain_name
from gatrain.data.encoding import HEAD_BYTES, MARK, check_encoding, check_head
from gatrain.errors import DataError, nearest

FORMATS = ("auto", "text", "jsonl", "json", "csv", "tsv", "parquet")
KIND_NAMES = {
    "text": "text files",
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "parquet",
}

_BY_NAME = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip
SOURCES = frozenset((
    ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".bib", ".texi", ".srt", ".vtt", ".po", ".diff",
    ".patch", ".py", ".pyi", ".pyx", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp",
    ".cxx", ".hpp", ".cu", ".cuh", ".java", ".go", ".rs", ".rb", ".php", ".pl", ".pm", ".sh", ".bash",
    ".zsh", ".fish", ".ps1", ".sql", ".r", ".jl", ".m", ".scala", ".kt", ".kts", ".swift", ".cs", ".fs",
    ".vb", ".lua", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".scm", ".vim",
    ".asm", ".s", ".f", ".f90", ".f95", ".for", ".pas", ".d", ".nim", ".zig", ".dart", ".groovy",
    ".gradle", ".cmake", ".mk", ".mak", ".in", ".am", ".ac", ".yaml", ".yml", ".toml", ".ini", ".cfg",
    ".conf", ".properties", ".env", ".css", ".scss", ".sass", ".less", ".vue", ".svelte", ".v", ".sv",
    ".vhd", ".vhdl", ".proto", ".thrift", ".graphql", ".tf",
))  # fmt: skip
"""Names that say that a file is prose or source code. What any other holds, its content decides."""

_PROSE = (
    ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".bib", ".texi", ".srt", ".vtt", ".po", ".diff", ".patch",
)  # fmt: skip
_SETTINGS = (".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".properties", ".in", ".env")
PROGRAMS = SOURCES.difference(_PROSE, _SETTINGS)
"""Those of programs: a folder that holds any is a project."""

_UNPACK = "Unpack it and name what was in it."
_EXPORT = "Export its text to .txt, .jsonl or .parquet first."
_NO_TEXT = "It holds no text; name the text files only, for example data.path='FOLDER/**/*.txt'."
_WEIGHTS = "It holds weights or pickled objects, which are never opened here. Save texts as .jsonl or .txt."
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", _NO_TEXT),
    (0, b"\xff\xd8\xff", "a JPEG image", _NO_TEXT),
    (0, b"GIF87a", "a GIF image", _NO_TEXT),
    (0, b"GIF89a", "a GIF image", _NO_TEXT),
    (8, b"WEBP", "a WebP image", _NO_TEXT),
    (8, b"WAVE", "a WAV recording", _NO_TEXT),
    (0, b"II*\0", "a TIFF image", _NO_TEXT),
    (0, b"MM\0*", "a TIFF image", _NO_TEXT),
    (4, b"ftyp", "a video or recording", _NO_TEXT),
    (0, b"OggS", "an Ogg recording", _NO_TEXT),
    (0, b"fLaC", "a FLAC recording", _NO_TEXT),
    (0, b"ID3", "an MP3 recording", _NO_TEXT),
    (0, b"\x7fELF", "a program", _NO_TEXT),
    (0, b"%PDF-", "a PDF", "Extract its text first, for example with pdftotext FILE.pdf FILE.txt."),
    (0, b"%!PS", "a PostScript file", _EXPORT),
    (0, b"{\\rtf", "an RTF document", _EXPORT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _EXPORT),
    (0, b"PK\x03\x04", "a zip archive (or a document or saved model in one)", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "LZ4 data", _UNPACK),
    (0, b"\x1f\x9d", "data of compress", _UNPACK),
    (0, b"\x93NUMPY", "a NumPy array", "If it holds tokens, name it .npy."),
    (0, b"\x89HDF", "an HDF5 file", _EXPORT),
    (0, b"SQLite format 3\0", "an SQLite database", _EXPORT),
    (
        0,
        b"ARROW1",
        "an Arrow file",
        "Write it as parquet: pyarrow.parquet.write_table(table, 'FILE.parquet').",
    ),
    (
        0,
        b"FEA1",
        "a Feather file",
        "Write it as parquet: pyarrow.parquet.write_table(table, 'FILE.parquet').",
    ),
    (0, b"ORC", "an ORC file", _EXPORT),
    (0, b"Obj\x01", "an Avro file", _EXPORT),
    (0, b"GGUF", "a GGUF model", _WEIGHTS),
)
_REFUSED_NAMES = {
    ".ipynb": "Convert it first: jupyter nbconvert --to script FILE, or --to markdown.",
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".safetensors", ".npz"), _WEIGHTS),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".tbz", ".txz", ".jar", ".whl"), _UNPACK),
    **dict.fromkeys(
        (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".xlsx", ".xls", ".pptx", ".ods"), _EXPORT
    ),
    **dict.fromkeys(
        (".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".mds"), _EXPORT
    ),
}
_MARKUP_NAMES = (".html", ".htm", ".xhtml", ".xml")
_MARKUP = re.compile(
    rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html[\s>]|\?xml[\s?]|svg[\s>])", re.IGNORECASE | re.DOTALL
)
_NETPBM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s")
_OLD_PICKLE = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n(?:p\d+\n|\()|\([ld]p\d+\n|\(i[A-Za-z_][\w.]*\n")
_JSON_OBJECT = re.compile(r"\s*\{\s*\"(?:[^\"\\]|\\.)*\"\s*:")
_JSON_ARRAY = re.compile(r"\s*\[\s*(?:\{\s*\"|\{\s*\}|\[|\"(?:[^\"\\]|\\.)*\"\s*[,\]])")
_COLUMN = re.compile(r"[^\W\d][\w.:-]{0,40}")

UNREAD_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "jpg", "jpeg", "jfif", "gif", "bmp", "tif", "tiff", "webp", "ico", "heic", "psd"),
        *("mp3", "wav", "flac", "ogg", "m4a", "mp4", "avi", "mov", "mkv", "webm"),
        *("ttf", "otf", "woff", "woff2", "pyc", "pyo", "so", "o", "a", "class", "exe", "dll", "dylib", "lock"),
    )
)  # fmt: skip
"""Of a folder these are left out and counted: images, recordings, fonts and compiled code, which nobody means to
read as text. Named one by one they are refused."""


@dataclass(frozen=True)
class Reading:
    """How files are read: ``encoding`` of their text, ``format`` (one of `FORMATS`), and the field of a record that
    holds its text (a dotted name for nested fields)."""

    encoding: str = "utf-8"
    format: str = "auto"
    text_field: str = "text"

    @classmethod
    def checked(cls, encoding: str, format: str, text_field: str) -> Reading:
        """Check the values that a user gives.

        Raises:
            DataError: an unknown encoding or format, or an empty field.
        """
        if format not in FORMATS:
            raise DataError(
                f"data.format={format} is not one of {', '.join(FORMATS)}.{nearest(str(format), FORMATS)}"
            )
        if not isinstance(text_field, str) or not text_field:
            raise DataError(
                f"data.text_field={text_field!r} is no name of a field, such as data.text_field=text."
            )
        return cls(check_encoding(encoding), format, text_field)


def format_of(file: Path, reading: Reading, fields: Sequence[str] = ()) -> str:
    """Which of `FORMATS` but ``auto`` a file is.

    Args:
        file: any regular file.
        reading: how it is to be read.
        fields: names of columns by which a table is known whatever its name, beside ``reading.text_field``.

    Raises:
        DataError: it is none of them, or not what its name says; says what to do.
    """
    with open_bytes(file) as stream:
        head = stream.read(HEAD_BYTES)
    name = plain_name(file)
    suffix = name.suffix.lower()
    if head.startswith(b"PAR1"):
        if file != name:
            raise DataError(f"{file} is a compressed parquet file. Unpack it: parquet compresses by itself.")
        return "parquet"
    if suffix in (".parquet", ".pq") and head and reading.format == "auto":
        raise DataError(f"{file} is not a parquet file, as its name says. Rename it, or write it again.")
    _check_no_binary(file, suffix, head)
    if reading.format != "auto":
        return reading.format
    if suffix in _MARKUP_NAMES or ((suffix not in SOURCES or suffix == ".md") and _MARKUP.match(head)):
        raise DataError(
            f"{file} is HTML or XML. Extract its text first (for example with trafilatura or BeautifulSoup), or "
            "say data.format=text to train on the markup itself."
        )
    named = _BY_NAME.get(suffix)
    if named in ("csv", "tsv") or (named is None and suffix in SOURCES):
        return named or "text"
    check_head(file, head, reading.encoding)
    text = head.decode(reading.encoding, errors="ignore").removeprefix(MARK)
    return _by_content(text, named or suffix, reading, fields)


def _check_no_binary(file: Path, suffix: str, head: bytes) -> None:
    for place, magic, what, remedy in _MAGIC:
        if head[place : place + len(magic)] == magic:
            if place == 8 and not head.startswith(b"RIFF"):
                continue
            raise DataError(f"{file} is {what}, not text. {remedy}")
    if _NETPBM.match(head):
        raise DataError(f"{file} is a netpbm image, not text. {_NO_TEXT}")
    if (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")) or _OLD_PICKLE.match(head):
        raise DataError(f"{file} is a pickle, not text. {_WEIGHTS}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27 and head[:8].count(0) >= 4:
        raise DataError(f"{file} is a safetensors file, not text. {_WEIGHTS}")
    if suffix in _REFUSED_NAMES and head:
        raise DataError(f"{file} is a {suffix} file by its name, not text. {_REFUSED_NAMES[suffix]}")


def _by_content(text: str, name: str, reading: Reading, fields: Sequence[str]) -> str:
    """Of a file whose ``name`` says nothing, or only JSON (``.json`` or ``jsonl``)."""
    start = text.lstrip()
    lines = start.split("\n")
    if _JSON_OBJECT.match(start):
        is_whole = len(lines) > 1 or len(text) < HEAD_BYTES // 4
        return "jsonl" if not is_whole or _is_json(lines[0]) else "json"
    if _JSON_ARRAY.match(start):
        return "json"
    if name in (".json", "jsonl"):
        return name.removeprefix(".")
    delimiter = table_delimiter(lines, {reading.text_field.split(".")[0], *fields})
    return {None: "text", "\t": "tsv"}.get(delimiter, "csv")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def table_delimiter(lines: Sequence[str], fields: set[str]) -> str | None:
    """What separates the columns, if the first lines of a file are a table with a line of names above it.

    Prose has commas too, so much is asked: names without spaces, and either one of ``fields`` among them or five
    lines of as many columns each.
    """
    first = lines[0].rstrip("\r")
    for delimiter in ("\t", ",", ";", "|"):
        names = [name.strip('"') for name in first.split(delimiter)]
        if (
            len(names) < 2
            or not all(_COLUMN.fullmatch(name) for name in names)
            or len(set(names)) < len(names)
        ):
            continue
        whole = [line + "\n" for line in lines[:-1]] if len(lines) > 2 else list(lines)
        try:
            rows = [row for row in csv.reader(whole, delimiter=delimiter) if row]
        except csv.Error:
            continue
        same = sum(len(row) == len(names) for row in rows[1:])
        if fields & set(names) and 2 * same >= len(rows) - 1 >= 1:
            return delimiter
        if same >= 5 and same == len(rows) - 1 and (len(names) > 2 or delimiter == "\t"):
            return delimiter
    return None
