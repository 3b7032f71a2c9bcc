"""Text files -> a cache folder with their tokens, their tokenizer and the report of what was read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gatrain.data.cache import build_once
from gatrain.data.documents import Corpus, files_state
from gatrain.data.formats import Reading
from gatrain.data.report import DataReport, Omissions
from gatrain.data.stdlib import stdlib_files, stdlib_fingerprint
from gatrain.data.text_files import Files
from gatrain.data.token_file import TokenFile, TokenWriter, smallest_dtype
from gatrain.data.tokenizer import Tokenizer, check_tokenizer, make_tokenizer, tokenizer_key
from gatrain.errors import DataError, RunFolderError
from gatrain.rundir import read_json, write_json

REPORT = "report.json"
LENGTHS = "lengths.npy"
"""Tokens of each document, those of held-out files last, without the end-of-text token."""
MOST_LENGTH = 2**32 - 1


def tokenised(
    files: Files | None,
    vocab_size: int,
    kind: str,
    reading: Reading,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The cache folder with ``tokens.npy``, ``held_out.npy`` where there are held-out files, ``tokenizer.json`` and
    the report, of ``files`` (None: the standard library).

    Documents follow one another, each ended by the end-of-text token. Memory holds some pieces of text and
    the tokenizer's word counts, whatever the size of the files.
    """
    check_tokenizer(kind, vocab_size)
    train, held_out, key = text_sources(files, reading)

    def build(folder: Path) -> None:
        corpus, tested = Corpus(train, reading), Corpus(held_out, reading)
        tokenizer = make_tokenizer(kind, corpus.training_texts(), vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        with TokenWriter(folder / LENGTHS, "uint32") as lengths:
            for part, name in ((corpus, "tokens.npy"), (tested, "held_out.npy")):
                if part.files and _write(folder / name, part, tokenizer, lengths) == 0:
                    raise no_text(part.files)
        check_unchanged(files, key)
        documents = corpus.documents + tested.documents
        write_report(folder, [corpus, tested], tokenizer.met, documents, "documents")

    whole_key = {**key, "vocab_size": vocab_size, "tokenizer": tokenizer_key(kind)}
    return build_once("text", whole_key, build, cache_dir)


def _write(path: Path, corpus: Corpus, tokenizer: Tokenizer, lengths: TokenWriter) -> int:
    ends: list[bool] = []
    length = 0

    def texts() -> Iterator[str]:
        for text, is_end in corpus.pieces():
            ends.append(is_end)  # for the reader behind
            yield text

    with TokenWriter(path, smallest_dtype(tokenizer.size)) as writer:
        for ids in tokenizer.encode_all(texts()):
            writer.write(ids)
            length += len(ids)
            if ends.pop(0):
                writer.write([tokenizer.end_of_text])
                lengths.write([min(length, MOST_LENGTH)])
                length = 0
    return writer.size


def longer_documents(folder: Path, context: int) -> int:
    """How many documents have more tokens than a sample predicts."""
    lengths = TokenFile(folder / LENGTHS)
    blocks = range(0, lengths.size, 1 << 22)
    return sum(int((lengths.read(start, start + (1 << 22)) >= context).sum()) for start in blocks)


def text_sources(files: Files | None, reading: Reading) -> tuple[list[Path], list[Path], dict[str, Any]]:
    """The files to train on, those held out, and what identifies their contents and the way they are read."""
    options = {"encoding": reading.encoding, "format": reading.format, "text_field": reading.text_field}
    if files is None:
        sources = stdlib_files()
        return sources, [], {"stdlib": stdlib_fingerprint(sources), **options}
    states = {"files": files_state(files.train), "held_out": files_state(files.held_out)}
    return files.train, files.held_out, {**states, **options}


def check_unchanged(files: Files | None, key: Mapping[str, Any]) -> None:
    """Refuse files that are others than when their ``key`` was made, before they were read.

    Raises:
        DataError: names one.
    """
    if files is None:
        return
    for name, part in (("files", files.train), ("held_out", files.held_out)):
        for before, now in zip(key[name], files_state(part), strict=True):
            if before != now:
                raise DataError(f"{now[0]} changed while it was read. Start again when it is whole.")


def no_text(files: list[Path]) -> DataError:
    """The error for files in which there is nothing."""
    return DataError(
        f"no text in {files[0]}{' and the other files' if len(files) > 1 else ''}. Give a file with text in it."
    )


def write_report(folder: Path, parts: list[Corpus], further: Omissions, items: int, item_name: str) -> None:
    """Keep what was met while ``parts`` were read, and ``further`` things."""
    omissions, totals = Omissions(), Counter[str]()
    for each in (each for met in (*(part.omissions for part in parts), further) for each in met.found()):
        totals[each.what] += each.of or 0
        omissions.add(each.what, None, each.count, totals[each.what] or None)
        for example in each.examples:
            omissions.add(each.what, example, 0)
    files = [file for part in parts for file in part.files]
    kinds = dict.fromkeys(part.kind for part in parts if part.files)
    report = DataReport(
        kind=", ".join(kinds),
        files=len(files),
        size_bytes=sum(file.stat().st_size for file in files),
        items=items,
        item_name=item_name,
        encoding=parts[0].reading.encoding,
        omissions=omissions.found(),
    )
    write_json(folder / REPORT, report.to_dict())


def read_report(folder: Path) -> DataReport:
    """The report that was kept.

    Raises:
        DataError: it is damaged.
    """
    try:
        return DataReport.from_dict(read_json(folder / REPORT))
    except (RunFolderError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / REPORT} is damaged ({error}). Delete {folder}: it is built again."
        ) from None
