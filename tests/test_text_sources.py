"""Laws of what is read as text: read right or refused with what to do, by content as well as by name; nothing is
replaced, left out or cut without a count."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from hostile import Payload

from gatrain import cli
from gatrain.data import PaddedText, TextWindows, encoding, records
from gatrain.data.compressed import open_bytes
from gatrain.data.encoding import decoded
from gatrain.data.report import DataRecord, DataReport
from gatrain.data.text import GO_ON, LEFT_OVER
from gatrain.errors import ConfigError, DataError, GatrainError
from gatrain.report.data_lines import data_lines

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "grey", "hills"]
TEXT = "".join(f"{' '.join(WORDS[i % 5 : i % 5 + 6])} {i}\n" for i in range(80))
LATIN = "".join(f"señor größer façade été {i}\n" for i in range(60))
CHINESE = "漢字仮名交文中国語文章" * 90
RECORDS = [{"text": f"the cat sat on mat {i}", "id": i} for i in range(40)]
LINES = "\n".join(json.dumps(record) for record in RECORDS)
TABLE = "id,text,label\n" + "".join(f'{i},"the cat, on\na ""mat"" {i}",{i % 3}\n' for i in range(40))


pytestmark = pytest.mark.usefixtures("own_cache")


def windows(path: Any, **options: Any) -> TextWindows:
    return TextWindows(path, **{"vocab_size": 300, "context": 8, "eval_fraction": 0.0, **options})


def pairs(path: Any, **options: Any) -> PaddedText:
    return PaddedText(path, **{"vocab_size": 300, "context": 32, **options})


def counts(report: DataReport) -> dict[str, int]:
    """What was left out, without what the cut into windows says."""
    return {each.what: each.count for each in report.omissions if each.what not in (GO_ON, LEFT_OVER)}


def documents(data: TextWindows) -> list[str]:
    """The texts that were read, decoded again from the tokens."""
    assert data.tokenizer is not None
    ids = data.tokens.read(0, data.tokens.size)
    ends = np.flatnonzero(ids == data.tokenizer.end_of_text)
    return [
        data.tokenizer.decode(part[part != data.tokenizer.end_of_text].tolist())
        for part in np.split(ids, ends + 1)
    ][:-1]


def parquet_of(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def tar_of(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zip_of(name: str, content: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def damaged(data: bytes, place: int = -12) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


# Broken and hostile files: each is refused before anything is kept, with its name and what to do


@dataclass(frozen=True)
class Hostile:
    name: str
    content: bytes | Callable[[], bytes]
    message: str
    options: dict[str, Any] = field(default_factory=dict)
    source: Callable[..., Any] = windows


GZ = gzip.compress(LINES.encode(), mtime=0)
HALF = '\n{"text": "broken \\ud83d here"}'
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR"
HOSTILE = [
    # encodings
    Hostile("latin1.txt", LATIN.encode("cp1252"), r"byte 2 \(line 1\): 0xf1 is not utf-8.*data.encoding=cp1252"),
    Hostile("late.txt", TEXT.encode() * 400 + b"\xff", r"byte \d{6} \(line 32001\): 0xff"),
    Hostile("half.txt", TEXT.encode() + "漢".encode()[:2], "ends in the middle of a character"),
    Hostile("utf16.txt", CHINESE.encode("utf-16"), "byte-order mark of UTF-16.*data.encoding=utf-16"),
    Hostile("utf16le.txt", CHINESE.encode("utf-16-le"), "looks like UTF-16-LE without.*data.encoding=utf-16-le"),
    Hostile("utf16be.txt", CHINESE.encode("utf-16-be"), "looks like UTF-16-BE without.*data.encoding=utf-16-be"),
    Hostile("utf16le_ascii.txt", TEXT.encode("utf-16-le"), "looks like UTF-16-LE without"),
    Hostile("utf16be_ascii.txt", TEXT.encode("utf-16-be"), "looks like UTF-16-BE without"),
    Hostile("japanese.txt", ("これは日本語。です、\n" * 60).encode("utf-16-le"), "looks like UTF-16-LE"),
    Hostile("korean.txt", ("한국어문장입니다。" * 60).encode("utf-16-be"), "looks like UTF-16-BE"),
    Hostile("utf32.txt", TEXT.encode("utf-32"), "byte-order mark of UTF-32"),
    Hostile("utf32be.txt", TEXT.encode("utf-32-be"), "looks like UTF-32-BE without"),
    Hostile("marked.txt", b"\xef\xbb\xbf" + TEXT.encode(), "mark of UTF-8.*read as cp1252", {"encoding": "cp1252"}),
    Hostile("unmarked.txt", TEXT.encode("utf-16-le"), "say data.encoding=utf-16-le", {"encoding": "utf-16"}),
    Hostile("surrogate.txt", b"\xed\xa0\xbd" + TEXT.encode(), r"byte 0 \(line 1\): 0xed"),
    Hostile("null.txt", TEXT.encode() * 12 + b"\0" * 64, "holds a null character, line 961"),
    Hostile("control.txt", bytes(range(1, 32)) * 40, "control characters"),
    Hostile("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"byte 24 \(line 2\): 0xff"),
    Hostile("jis.txt", ("これは。\n" * 60).encode("iso2022_jp"), r"escape sequences of ISO-2022.*line 1"),
    Hostile("utf8.txt", LATIN.encode(), "is UTF-8, but is to be read as cp1252", {"encoding": "cp1252"}),
    Hostile("utf8_cjk.txt", CHINESE.encode(), "It looks like UTF-8: data.encoding=utf-8", {"encoding": "gbk"}),
    Hostile("late8.txt", TEXT.encode() * 300 + LATIN.encode(), "is UTF-8, but", {"encoding": "latin-1"}),
    # JSON
    Hostile("surrogate.jsonl", (LINES + HALF).encode(), r"line 41: .*surrogate \\ud83d, character 8"),
    Hostile("surrogate.json", b'[{"text": "\\udc00"}]', r"record 1: .*lone surrogate"),
    Hostile("broken.jsonl", (LINES + '\n{"text": ').encode(), "line 41: not valid JSON"),
    Hostile("array_cut.json", json.dumps(RECORDS)[:-20].encode(), "record 40: not valid JSON"),
    Hostile("array_two.json", b'[{"text": "a"}] [{"text": "b"}]', "something follows the end"),
    Hostile("array_comma.json", b'[{"text": "a"} {"text": "b"}]', "after record 1: not valid JSON"),
    Hostile("numbers.json", b"[1, 2, 3]", "record 1: expected a JSON object"),
    Hostile("twice.jsonl", b'{"text": "a", "text": "b"}', "line 1: .*field 'text' is there twice"),
    Hostile("deep.jsonl", b'{"text": ' + b"[" * 200_000, "line 1: not valid JSON"),
    Hostile("deep.json", b"[" * 200_000, "record 1: not valid JSON"),
    Hostile("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    Hostile("null_text.jsonl", b'{"text": null}', "line 1: field 'text' is not a string but null"),
    Hostile("columns.json", b'{"text": ["a", "b"]}', "field 'text' is not a string but a list"),
    Hostile("config.json", b'{"name": "x", "version": 3}', "it has 'name', 'version'.*data.text_field="),
    Hostile("chat.jsonl", b'{"messages": [{"role": "user"}]}', r"a chat in 'messages'.*apply_chat_template"),
    Hostile("pairs.jsonl", b'{"prompt": "a", "completion": 3}', "field 'completion' is not", source=pairs),
    Hostile("nested.jsonl", b'{"m": {"text": "x"}}', "it has 'm.text'", {"text_field": "m.body"}),
    Hostile("alpaca.json", b'[{"instruction": "a", "output": "b"}]', "data.prompt_field=A", source=pairs),
    Hostile("pairs_as_text.jsonl", b'{"prompt": "a", "completion": "b"}', "recipe=padded"),
    Hostile("braces.txt", b'{"text": "a"}\nand then prose\n', "line 2: not valid JSON.*data.format=text"),
    # tables
    Hostile("no_field.csv", b"id,body\n1,hello\n", "line 2: has no field 'text'; it has 'id', 'body'"),
    Hostile("mac.csv", b"id,text\r1,a\r2,b\r", "lines end with a carriage return alone"),
    Hostile("sep.csv", b"sep=;\nid;text\n1;a\n2;b;c\n", "line 4: 3 columns under 2 names"),
    Hostile("ragged.csv", b"id,text\n1,a\n2,b,c\n", "line 3: 3 columns under 2 names"),
    Hostile("quote.csv", b'id,text\n1,"never closed\n2,b\n', "line 2: not valid CSV"),
    Hostile("twice.csv", b"text,text\na,b\n", "names the column 'text' twice"),
    Hostile("tabs.txt", b"id\tbody\n" + b"".join(b"%d\tword\n" % i for i in range(9)), "has no field 'text'"),
    # compression
    Hostile("cut.jsonl.gz", GZ[:-30], "cut.jsonl.gz is cut off"),
    Hostile("crc.jsonl.gz", damaged(GZ, -6), "crc.jsonl.gz is damaged"),
    Hostile("tail.jsonl.gz", GZ + b"something", "tail.jsonl.gz is damaged.*follow its end"),
    Hostile("twice.txt.gz", gzip.compress(GZ), "compressed twice"),
    Hostile("plain.txt.gz", b"plain", "is called .gz but is not compressed"),
    Hostile("cut.txt.zst", zstd.compress(TEXT.encode())[:-7], "cut.txt.zst is cut off"),
    Hostile("bad.txt.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "bad.txt.zst is damaged"),
    Hostile("cut.txt.bz2", bz2.compress(TEXT.encode())[:-9], "is cut off"),
    Hostile("tail.txt.xz", lzma.compress(TEXT.encode()) + b"tail", "is damaged"),
    # parquet
    Hostile("cut.parquet", lambda: parquet_of({"text": ["a"] * 99})[:-30], "not a whole parquet file"),
    Hostile("noise.parquet", b"PAR1" + bytes(range(256)) * 2 + b"PAR1", "not a whole parquet file"),
    Hostile("no.parquet", b"hello", "is not a parquet file"),
    Hostile("number.parquet", lambda: parquet_of({"text": [1, 2]}), "row 1: field 'text' is not a string"),
    Hostile("bytes.parquet", lambda: parquet_of({"text": [b"a"]}), "row 1: field 'text' is not a string but bytes"),
    Hostile("no_field.parquet", lambda: parquet_of({"body": ["a"]}), "row 1: has no field 'text'; it has 'body'"),
    # what is no text
    Hostile("picture.txt", PNG, "picture.txt is a PNG image"),
    Hostile("photo.txt", b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
    Hostile("paper.txt", b"%PDF-1.7\n" + TEXT.encode(), "a PDF.*pdftotext"),
    Hostile("page.txt", b"<!-- x -->\n<!DOCTYPE html><html>" + TEXT.encode(), "HTML or XML.*data.format=text"),
    Hostile("page.html", TEXT.encode(), "HTML or XML"),
    Hostile("archive.txt", zip_of("a.txt", TEXT), "a zip archive"),
    Hostile("up.tar", tar_of("../../evil.txt", TEXT.encode()), "a tar archive"),
    Hostile("up.tar.gz", gzip.compress(tar_of("../evil.txt", TEXT.encode())), "a tar archive"),
    Hostile("objects.txt", pickle.dumps(Payload()), "a pickle"),
    Hostile("objects.pkl", pickle.dumps(Payload(), protocol=0), "a pickle"),
    Hostile("old.txt", b"cposix\nsystem\np0\n(S'touch executed'\np1\ntp2\nRp3\n.", "a pickle"),
    Hostile("scan.txt", b"P3\n# made\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12", "a netpbm image"),
    Hostile("drawing.txt", b"<svg width='3'></svg>", "HTML or XML"),
    Hostile("notes.ipynb", b'{"cells": []}', "jupyter nbconvert"),
    Hostile("shard.train", b'{"body": "x"}', "has no field 'text'"),
    Hostile("rows.parquet.gz", lambda: gzip.compress(parquet_of({"text": ["a"]})), "a compressed parquet file"),
    Hostile("objects.jsonl", pickle.dumps(Payload()), "a pickle"),
    Hostile("weights.txt", (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}' + b" " * 60, "a safetensors file"),
    Hostile("array.txt", b"\x93NUMPY\x01\0" + bytes(64), "a NumPy array"),
    Hostile("table.txt", b"SQLite format 3\0" + bytes(64), "an SQLite database"),
    Hostile("program.txt", b"\x7fELF" + bytes(64), "a program"),
    Hostile("empty.txt", b"", "no text in"),
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_broken_and_hostile_files_are_refused_with_their_name(
    hostile: Hostile, tmp_path: Path, own_cache: Path
) -> None:
    path = tmp_path / hostile.name
    path.write_bytes(hostile.content() if callable(hostile.content) else hostile.content)
    with pytest.raises(DataError, match=hostile.message) as caught:
        hostile.source(path, **hostile.options)
    assert caught.value.exit_code == 4
    assert hostile.name in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert not list(own_cache.rglob("tokens.npy"))


def test_there_are_fifty() -> None:
    assert len({hostile.name for hostile in HOSTILE}) >= 50


TOKENIZERS = {
    "broken": ("{", "not a tokenizer"),
    "deep": ("[" * 100_000, "not a tokenizer"),
    "list": ("[]", "not a tokenizer"),
    "bytes": ("\ufeff\x00", "not a tokenizer"),
    "gap": ({"vocab": {"<unk>": 0, "<eos>": 70_000}}, "data.vocab_size=300 is below 70001"),
    "twins": ({"vocab": {"<unk>": 0, "<eos>": 1, "the": 1}}, "two tokens the same id"),
    "negative": ({"vocab": {"<unk>": 0, "<eos>": -1}}, "not a tokenizer"),
    "endless": ({"vocab": {"<unk>": 0}}, "no token to end a text"),
    "unknown": ({"vocab": {"<eos>": 0}, "unk_token": "nope"}, "cannot encode the text"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_and_hostile_tokenizers_are_refused(name: str, tmp_path: Path) -> None:
    content, message = TOKENIZERS[name]
    if isinstance(content, dict):
        model = {"type": "WordLevel", "unk_token": "<unk>", **content}
        content = json.dumps({"version": "1.0", "model": model, "added_tokens": []})
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(DataError, match=message):
        windows("text.txt", tokenizer="tokenizer.json")


def test_what_a_tokenizer_does_not_know_is_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers

    (tmp_path / "text.txt").write_text("one two one three " * 20)
    words = Inner(models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save("words.json")
    (unknown,) = [
        each for each in windows("text.txt", tokenizer="words.json").report.omissions if each.count == 20
    ]
    assert (unknown.of, unknown.examples) == (80, ("'three'",))
    Inner(models.BPE({"<eos>": 0, "o": 1, "n": 2, "e": 3, " ": 4}, [])).save("letters.json")
    found = windows("text.txt", tokenizer="letters.json").report.omissions
    (dropped,) = [each for each in found if "left out" in each.what]
    assert dropped.count == sum("one two one three ".count(c) for c in "twhr") * 20
    (tmp_path / "text.txt").write_text("one<|endoftext|>two " * 20)
    assert list(counts(windows("text.txt").report)) == [
        "end-of-text tokens spelled out in the texts, read as such"
    ]


# What is read: the same documents in every wrapping, with everything counted


WRAPPINGS: dict[str, bytes | Callable[[], bytes]] = {
    "lines.jsonl": LINES.encode(),
    "lines.json": LINES.encode(),
    "lines.txt": LINES.encode(),
    "lines.shard": LINES.encode(),
    "part-00000": LINES.encode(),
    "crlf.ndjson": LINES.replace("\n", "\r\n").encode(),
    "array.json": json.dumps(RECORDS).encode(),
    "array.txt": json.dumps(RECORDS, indent=1).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "pretty.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "strings.json": json.dumps([record["text"] for record in RECORDS]).encode(),
    "table.csv": ("id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in RECORDS)).encode(),
    "table.txt": ("id,text\r\n" + "".join(f"{r['id']},{r['text']}\r\n" for r in RECORDS)).encode(),
    "excel.csv": (
        "sep=;\r\nid;text\r\n" + "".join(f"{r['id']};{r['text']}\r\n" for r in RECORDS)
    ).encode(),
    "semicolons.csv": ("id;text\n" + "".join(f"{r['id']};{r['text']}\n" for r in RECORDS)).encode(),
    "table.tsv": ("text\tid\n" + "".join(f"{r['text']}\t{r['id']}\n" for r in RECORDS)).encode(),
    "packed.jsonl.gz": GZ,
    "members.jsonl.gz": b"".join(gzip.compress((json.dumps(record) + "\n").encode()) for record in RECORDS),
    "unnamed": GZ,
    "packed.jsonl.zst": zstd.compress(LINES.encode()),
    "frames.json.zst": b"".join(zstd.compress((json.dumps(record) + "\n").encode()) for record in RECORDS),
    "packed.jsonl.bz2": bz2.compress(LINES.encode()),
    "packed.csv.xz": lzma.compress(("id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in RECORDS)).encode()),
    "rows.parquet": lambda: parquet_of({"id": list(range(40)), "text": [r["text"] for r in RECORDS]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_same_records_in_every_wrapping_are_the_same_documents(name: str, tmp_path: Path) -> None:
    content = WRAPPINGS[name]
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    data = windows(name)
    assert documents(data) == [record["text"] for record in RECORDS]
    assert (data.report.items, data.report.item_name, data.report.files) == (40, "documents", 1)
    assert counts(data.report) == {}


def test_quoted_fields_hold_line_ends_delimiters_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(TABLE)
    assert documents(windows("table.csv"))[7] == 'the cat, on\na "mat" 7'
    labels = windows("table.csv", text_field="label")
    assert len(documents(labels)) == 40
    assert counts(labels.report) == {"rows of several lines, by quoted line ends": 40}


def test_documents_that_go_on_in_the_next_sample_are_counted_for_every_context(tmp_path: Path) -> None:
    sizes = [1, 2, 3, 40, 50, 60]
    (tmp_path / "a.json").write_text(
        json.dumps(["".join(chr(97 + i % 23) for i in range(size)) for size in sizes])
    )
    data = windows("a.json", vocab_size=257)  # bytes
    assert {each.what: each.count for each in data.report.omissions}[GO_ON] == 3
    for context in (2, 3, 4, 40, 41, 59, 60):
        found = windows("a.json", vocab_size=257, context=context).report.omissions
        assert {each.what: each.count for each in found}[GO_ON] == sum(size >= context for size in sizes)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatrain.data import tokenised

    path = tmp_path / "growing.txt"
    path.write_text(TEXT)
    original = tokenised.write_report
    write = tokenised._write

    def writing(*args: Any) -> int:
        path.write_text(TEXT + "more")
        return write(*args)

    monkeypatch.setattr(tokenised, "_write", writing)
    for _ in range(2):
        with pytest.raises(DataError, match=r"growing\.txt changed while it was read"):
            windows("growing.txt")
        path.write_text(TEXT)
    assert original is tokenised.write_report


def test_dotted_names_reach_into_records(tmp_path: Path) -> None:
    nested = [{"m": {"c": record["text"]}, "m.d": record["text"]} for record in RECORDS]
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, nested)))
    (tmp_path / "nested.parquet").write_bytes(parquet_of({"m": [record["m"] for record in nested]}))
    expected = [record["text"] for record in RECORDS]
    for name, text_field in (("nested.jsonl", "m.c"), ("nested.jsonl", "m.d"), ("nested.parquet", "m.c")):
        assert documents(windows(name, text_field=text_field)) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prose.txt", "Roses, violets, lilies\n" + "He said, she said, they said\n" * 30),
        ("lyrics.txt", "[Verse 1]\n" + TEXT),
        ("quotes.txt", '"Hello," she said.\n' + TEXT),
        ("braces.txt", "{ not json }\n" + TEXT),
        ("digits.txt", "1 0 1 1 0\n" * 90),
        ("page.py", 'PAGE = """<!DOCTYPE html>"""\n' + TEXT),
        ("table.md", "a | b\n--- | ---\n" + "1 | 2\n" * 20),
        ("markup.txt", "<html>" + TEXT),
        ("lines.txt", LINES),
    ],
)
def test_plain_text_is_not_taken_for_records(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    data = windows(name, format="text" if name in ("markup.txt", "lines.txt") else "auto")
    assert documents(data) == [content]


@pytest.mark.parametrize(
    "name", ["cp1252", "utf-16", "utf-16-le", "UTF_32", "gb18030", "shift_jis", "utf-8-sig", "koi8-r"]
)
def test_a_stated_encoding_is_read_exactly(name: str, tmp_path: Path) -> None:
    text = {"gb18030": "中文文章。\n", "shift_jis": "これは。\n", "koi8-r": "Привет мир\n"}.get(
        name, "señor façade\n"
    ) * 60
    (tmp_path / "text.txt").write_bytes(text.encode(name))
    data = windows("text.txt", encoding=name, vocab_size=400)
    assert documents(data) == [text]
    assert data.report.encoding == __import__("codecs").lookup(name).name


@pytest.mark.parametrize("name", ["cp1253x", "rot13", "hex", "idna", "undefined", "a/b", "\0", "utf-9"])
def test_unknown_encodings_are_refused_with_those_allowed(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    for source in (windows, pairs):
        with pytest.raises(DataError, match=r"data\.encoding=.*Use utf-8, utf-16, cp1252"):
            source("text.txt", encoding=name)


@pytest.mark.parametrize("name", ["utf-8", "gb18030", "shift_jis", "utf-16-le", "utf-16"])
def test_blocks_may_end_within_a_character(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "日本 text\r\n" * 30
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(name))
    for size in (3, 7):
        monkeypatch.setattr(encoding, "BLOCK_BYTES", size)
        assert "".join(decoded(path, name)) == text
    path.write_bytes(text.encode("gb18030") + b"\xff\xff\xff")
    with pytest.raises(DataError, match=rf"byte {len(text.encode('gb18030'))} \(line 31\): 0xff"):
        list(decoded(path, "gb18030"))


def test_byte_order_marks_are_no_tokens_wherever_a_document_begins(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "corpus" / name).write_text("\ufeff" + TEXT, encoding="utf-8")
    (tmp_path / "corpus" / "d.jsonl").write_text(
        '\ufeff{"text": "\\ufeffhello \\ufeff there"}', encoding="utf-8"
    )
    data = windows("corpus")
    assert documents(data) == [TEXT] * 3 + ["hello \ufeff there"]
    assert counts(data.report) == {
        "byte-order marks dropped": 5,
        "zero-width no-break spaces (U+FEFF) within texts, kept": 1,
    }


@pytest.mark.parametrize("size", [7, 1 << 18])
def test_marks_where_files_were_joined_are_dropped_and_counted(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", size)
    (tmp_path / "joined.txt").write_text(("\ufeff" + TEXT) * 3, encoding="utf-8")
    (tmp_path / "joined.jsonl").write_text(("\ufeff" + LINES + "\n") * 3, encoding="utf-8")
    for name, expected in (("joined.txt", 1), ("joined.jsonl", 120)):
        data = windows(name)
        assert len(documents(data)) == expected
        assert counts(data.report) == {"byte-order marks dropped": 3}
    assert documents(windows("joined.txt")) == [TEXT * 3]


def test_everything_that_was_not_read_is_in_the_report_also_the_second_time(tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    for folder in (corpus, store):
        folder.mkdir()
    (corpus / "a.txt").write_text(TEXT + "\ufffd")
    (corpus / "nothing.txt").write_text("")
    (corpus / "photo.png").write_bytes(PNG)
    (corpus / ".hidden").write_text("hidden")
    (corpus / "again.txt").symlink_to(corpus / "a.txt")
    (corpus / "shards").symlink_to(store)
    (corpus / "loop").symlink_to(corpus)
    (store / "s.jsonl").write_text(LINES + '\n\n{"text": ""}\n{"text": "a\\u0000b\\u0093"}\n')
    expected = {
        "hidden files left out": 1,
        "links to a folder above them, not followed": 1,
        "further names of a file that is read already": 1,
        "files read through links that leave the folder": 1,
        "files called .png left out, which hold no text": 1,
        "empty files": 1,
        "replacement characters (U+FFFD) that the texts hold already, kept": 1,
        "blank lines left out": 1,
        "empty documents": 1,
        "null characters within texts, kept": 1,
    }
    for _ in range(2):
        report = windows("corpus").report
        assert counts(report) == expected
        assert (report.kind, report.files, report.items) == ("2 text files, 1 JSON Lines", 3, 42)
        assert len(report.fingerprint) >= 32


def test_windows_text_read_as_latin1_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("he said \u201cyes\u201d, señor\n" * 20).encode("cp1252"))
    assert counts(windows("a.txt", encoding="cp1252").report) == {}
    found = counts(windows("a.txt", encoding="latin-1").report)
    assert found == {
        "control characters U+0080 to U+009F, kept (cp1252 gives them where it is read as latin-1)": 40
    }


def test_all_files_that_are_no_text_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "set" / name).write_bytes(PNG)
    with pytest.raises(
        DataError, match=r"a\.txt is a PNG.*Nor can 2 further files be read: set/b\.txt, set/c\.txt"
    ):
        windows("set")


def test_names_that_are_not_utf8_and_hold_escape_sequences_are_read_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in (
        (b"\xff\x1b[31m.jsonl", (LINES + "\n\n").encode()),
        (b"\xfe.parquet", parquet_of({"text": ["hello there"] * 9})),
    ):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(content)
    report = windows("set").report
    assert report.items == 49
    for each in report.omissions:
        assert all(example.isprintable() and example.encode() for example in each.examples)


EMPTY = [{"text": ""}, *RECORDS]
KINDS: dict[str, tuple[dict[str, bytes | Callable[[], bytes]], Any, dict[str, int], tuple[int, str]]] = {
    "text files": (
        {"a.txt": b"\xef\xbb\xbf" + TEXT.encode(), "b.md": b"", ".c.txt": b"x", "d.png": PNG},
        windows,
        {
            "hidden files left out": 1,
            "files called .png left out, which hold no text": 1,
            "byte-order marks dropped": 1,
            "empty files": 1,
        },
        (1, "documents"),
    ),
    "JSON Lines": (
        {"a.jsonl": b'\n{"text": ""}\n' + LINES.encode()},
        windows,
        {"blank lines left out": 1, "empty documents": 1},
        (40, "documents"),
    ),
    "JSON": (
        {"a.json": json.dumps(EMPTY, indent=1).encode()},
        windows,
        {"empty documents": 1},
        (40, "documents"),
    ),
    "CSV": (
        {"a.csv": b"id,text\n\n1,\n" + b'2,"a\nb c d e f g h i"\n' * 9},
        windows,
        {"blank lines left out": 1, "empty documents": 1, "rows of several lines, by quoted line ends": 9},
        (9, "documents"),
    ),
    "parquet": (
        {"a.parquet": lambda: parquet_of({"text": [each["text"] for each in EMPTY]})},
        windows,
        {"empty documents": 1},
        (40, "documents"),
    ),
    "JSON Lines, packed": (
        {"a.jsonl.gz": gzip.compress(LINES.encode()), "b.jsonl.zst": zstd.compress(b"")},
        windows,
        {"empty files": 1},
        (40, "documents"),
    ),
    "token files (raw uint16)": (
        {f"{name}.bin": np.arange(300, dtype="uint16").tobytes() for name in ("train", "val", "test")},
        windows,
        {"files beside the splits, not read": 1},
        (600, "tokens"),
    ),
    "JSON Lines, pairs": (
        {
            "a.jsonl": "\n".join(
                json.dumps({"prompt": "", "completion": "word " * 90}) for _ in range(40)
            ).encode()
        },
        pairs,
        {
            "empty prompts, kept": 40,
            "completions cut to data.context at their end, with the end-of-text token": 40,
        },
        (40, "pairs"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_of_every_kind_of_source_tells_what_was_left_out_or_cut(kind: str, tmp_path: Path) -> None:
    files, source, expected, items = KINDS[kind]
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content() if callable(content) else content)
    for _ in range(2):  # the second time from the cache
        data = source("set")
        report = DataReport.from_dict(json.loads(json.dumps(data.report.to_dict())))
        assert report.kind == kind.split(", p")[0]
        assert counts(report) == expected
        assert (report.items, report.item_name) == items
        assert report.size_bytes == sum(
            path.stat().st_size
            for path in (tmp_path / "set").iterdir()
            if path.name not in (".c.txt", "d.png", "test.bin")
        )
        samples = len(data.eval) if data.eval is not None else 0
        lines = data_lines(DataRecord(report, len(data.train), samples))
        for what, count in expected.items():
            assert any(f"{count:,}" in line and what[:20] in line for line in lines), lines


def test_pairs_and_paragraphs_that_the_context_cuts_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q " * (40 if i < 10 else 2), "completion": "a " * (60 if i < 4 else 2)} for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = pairs("pairs.jsonl").report
    found = {each.what: (each.count, each.of, each.examples[0]) for each in report.omissions}
    assert found == {
        "prompts cut to data.context at their beginning": (10, 40, "pairs.jsonl, line 1"),
        "completions cut to data.context at their end, with the end-of-text token": (
            4,
            40,
            "pairs.jsonl, line 1",
        ),
    }
    assert (report.items, report.item_name) == (40, "pairs")
    (tmp_path / "text.txt").write_text("\n\n".join(["x", "long words " * 40, *["a few words here"] * 18]))
    found = {each.what: (each.count, each.of) for each in pairs("text.txt", context=16).report.omissions}
    assert found["paragraphs longer than data.context, cut into several samples"] == (1, 20)
    assert found["paragraphs of fewer than 2 tokens left out"] == (1, 20)


def test_pairs_come_from_tables_and_fields_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("q,a\n" + "".join(f"question {i},answer {i}\n" for i in range(30)))
    data = pairs("table.csv", prompt_field="q", completion_field="a", eval_fraction=0)
    sample = data.train[3]
    assert data.tokenizer.decode(sample["labels"][sample["labels"] >= 0].tolist()) == "answer 3"


def test_held_out_files_are_neither_trained_on_nor_seen_by_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "other.jsonl").write_text('{"text": "zebra zebra zebra zebra zebra"}\n' * 3)
    data = windows("train.jsonl", eval_path="other.jsonl")
    assert data.eval is not None
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.eval[0].tolist()).startswith("zebra"[:2])
    assert data.train.stop == data.tokens.size
    assert np.array_equal(data.tokens.array, windows("train.jsonl", eval_fraction=0).tokens.array)
    samples = pairs("train.jsonl", eval_path="other.jsonl")
    assert samples.eval is not None
    assert (len(samples.train), len(samples.eval)) == (40, 3)
    with pytest.raises(DataError, match="Nothing is left to train on"):
        windows("train.jsonl", eval_path="train.jsonl")
    with pytest.raises(DataError, match=r"data\.eval_path=.* without data\.path"):
        windows(None, eval_path="train.jsonl")


@pytest.mark.parametrize("layout", ["files", "folders", "shards"])
def test_splits_by_their_usual_names_are_held_out(layout: str, tmp_path: Path) -> None:
    name = {
        "files": "{}.jsonl", "folders": "{}/a.jsonl", "shards": "data/{}-00000-of-00001.jsonl",
    }[layout]  # fmt: skip
    for split, word in (("train", "apple"), ("validation", "pear"), ("test", "plum")):
        path = tmp_path / "set" / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps({"text": f"{word} " * 9}) for _ in range(9)))
    (tmp_path / "set" / "README.md").write_text("about")
    data = windows("set")
    assert set(documents(data)) == {"apple " * 9}
    assert data.eval is not None
    assert data.tokenizer is not None
    assert "pear" in data.tokenizer.decode(data.eval[1].tolist())
    assert counts(data.report) == {"files beside the splits, not read": 2}


def test_names_that_may_be_splits_are_refused_and_source_code_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text(LINES)
    (folder / "val.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"these look like splits.*data\.eval_path="):
        windows("set")
    assert len(documents(windows("set/*.jsonl"))) == 80
    for name in ("train.py", "test.py", "eval.py"):
        (folder / name).write_text(TEXT)
    (folder / "val.jsonl").unlink()
    (folder / "corpus.jsonl").unlink()
    assert len(documents(windows("set"))) == 3


@pytest.mark.parametrize("path", ["", "  ", [], [""], "$CORPUS/x", {"a": 1}])
def test_an_empty_path_is_refused(path: Any) -> None:
    for source in (windows, pairs):
        with pytest.raises(ConfigError, match=r"data\.path") as caught:
            source(path)
        assert caught.value.exit_code == 2


def test_a_list_of_paths_reads_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first " * 200)
    (tmp_path / "b.txt").write_text("second " * 200)
    data = windows(["b.txt", "a.txt", "*.txt"])
    assert documents(data) == ["second " * 200, "first " * 200]
    assert counts(data.report) == {"further names of a file that is read already": 2}


def test_decompression_is_bounded_in_memory(tmp_path: Path) -> None:
    """64 MB of one letter in 64 kB: what is held at once is a few blocks."""
    import tracemalloc

    for name, content in (
        ("bomb.gz", gzip.compress(b"a" * (1 << 26))),
        ("bomb.zst", zstd.compress(b"a" * (1 << 26))),
        ("bomb.bz2", bz2.compress(b"a" * (1 << 26))),
    ):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        assert sum(map(len, decoded(tmp_path / name, "utf-8"))) == 1 << 26
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()


def test_a_record_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 10_000)
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 1000)
    for name, content in (("a.jsonl", '{"text": "' + "x" * 20_000), ("b.json", '[{"text": "' + "x" * 20_000)):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}, .*(too long for one record|not valid JSON)"):
            windows(name)


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("a.txt.zst", "backports.zstd", "pip install backports.zstd"),
        ("a.parquet", "pyarrow.parquet", "pip install pyarrow"),
    ],
)
def test_a_missing_library_is_named(
    name: str, module: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zstd.compress(TEXT.encode()) if name.endswith("zst") else parquet_of({"text": ["a"]})
    (tmp_path / name).write_bytes(content)
    for hidden in (module, "compression.zstd"):
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(DataError, match=remedy):
        windows(name)


def test_padding_with_zeros_after_a_member_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(GZ + b"\0" * 512)
    with open_bytes(tmp_path / "a.gz") as stream:
        assert stream.read() == LINES.encode()


# Planted or rotted tokens


@pytest.fixture
def built(tmp_path: Path, own_cache: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    (tmp_path / "text.txt").write_text(TEXT)
    tokens = windows("text.txt").tokens.array.copy()
    (folder,) = own_cache.glob("text-*[!k]")
    return folder, tokens


@pytest.mark.parametrize("name", ["tokens.npy", "tokenizer.json", "report.json"])
def test_changed_bytes_of_the_same_size_in_the_cache_are_noticed_and_built_again(
    built: tuple[Path, Any], name: str
) -> None:
    folder, tokens = built
    path = folder / name
    times = path.stat()
    path.write_bytes(damaged(path.read_bytes(), -3))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(windows("text.txt").tokens.array, tokens)
    assert json.loads((folder / "report.json").read_text())["items"] == 1


def test_the_cache_is_hashed_once_for_each_state_of_its_files(
    built: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatrain.data import cache

    folder, _ = built
    hashed: list[Path] = []
    original = cache._hash
    monkeypatch.setattr(cache, "_hash", lambda path: hashed.append(path) or original(path))
    windows("text.txt")
    assert hashed == []
    os.utime(folder / "tokens.npy")
    windows("text.txt")
    assert len(hashed) == 4
    windows("text.txt")
    assert len(hashed) == 4
    monkeypatch.setattr(cache, "VERIFIED_FOR_S", 0.0)  # a day later
    windows("text.txt")
    assert len(hashed) == 8


def test_paths_fields_and_encodings_stay_text_on_the_command_line(tmp_path: Path) -> None:
    from gatrain.compose.declared import text_arguments

    for source in ("TextWindows", "PaddedText"):
        taken = text_arguments(f"gatrain.data.{source}", tmp_path)
        assert all(taken[name].itself for name in ("path", "eval_path", "text_field", "encoding", "format"))
        assert all(taken[name].items for name in ("path", "eval_path"))


# Through the command line: the documented exit code, one sentence, and no run folder


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has two columns called 'text'"):
        windows("twice.parquet")


def test_the_command_line_tells_it_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin1.txt").write_bytes(LATIN.encode("cp1252"))
    for words, code in (
        ("fit recipe=llm data.path=latin1.txt", 4),
        ("fit recipe=padded data.path=latin1.txt data.encoding=utf-9", 4),
        ("fit recipe=llm data.path=", 2),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words.split(" "))
        _, err = capfd.readouterr()
        assert ended.value.code == code, err
        assert err.count("error: ") == 1
        assert "Traceback" not in err
    assert not (tmp_path / "outputs").exists()


def test_gatrain_errors_only(tmp_path: Path) -> None:
    """Noise of every kind under every name ends in a GatrainError or is read."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(
        f"noise{suffix}"
        for suffix in (
            ".txt",
            ".json",
            ".jsonl",
            ".csv",
            ".tsv",
            ".parquet",
            ".gz",
            ".zst",
            ".xz",
            ".bin",
            ".npy",
            "",
        )
    ):
        for high in (256, 128, 32):
            path = tmp_path / f"{number}_{high}_{name}"
            path.write_bytes(rng.integers(0, high, 700, dtype=np.uint8).tobytes())
            with pytest.raises(GatrainError):
                windows(path)
