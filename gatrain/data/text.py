"""Windows of equal length over one long sequence of tokens: the data of a language model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatrain.data.compressed import plain_name
from gatrain.data.fingerprint import content_fingerprint
from gatrain.data.formats import Reading
from gatrain.data.report import DataReport, Omission
from gatrain.data.stdlib import stdlib_files, stdlib_fingerprint
from gatrain.data.text_files import Files, Given, find_files
from gatrain.data.token_file import TokenFile, Tokens, open_tokens, unigram_loss
from gatrain.data.token_layout import beside
from gatrain.data.tokenised import longer_documents, read_report, tokenised
from gatrain.data.tokenizer import Tokenizer, check_tokenizer, make_tokenizer, own_file
from gatrain.errors import ConfigError, DataError, nearest
from gatrain.labels import IGNORED

TOKEN_SUFFIXES = (".bin", ".npy")
GO_ON = "documents longer than data.context, which go on in the next samples"
FIRST_TOKENS = "documents whose first token nothing predicts (data.packed=isolated)"
PACKED = ("joined", "isolated")
LEFT_OVER = "tokens at the end, too few for one sample more"


class TokenWindows:
    """Map-style dataset: item ``i`` is int64 ``[context + 1]``, tokens ``i*context`` to ``(i+1)*context``.

    Neighbours share one token, so that every token but the first is predicted exactly once.
    """

    deterministic = True

    def __init__(self, tokens: Tokens, start: int, stop: int, context: int) -> None:
        self.tokens = tokens
        self.start = start
        self.stop = stop
        self.context = context

    def __len__(self) -> int:
        return max(0, (self.stop - self.start - 1) // self.context)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Several samples with one copy; the tensors are rows of one array."""
        return list(self.batch_of(indices).unbind())

    def batch_of(self, indices: Sequence[int]) -> Tensor:
        """Several samples as one tensor, int64 ``[B, context + 1]``."""
        rows = np.empty((len(indices), self.context + 1), dtype=np.int64)
        total = len(self)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < total:
                raise IndexError(f"sample {index} of {total}")
            first = self.start + index * self.context
            row[:] = self.tokens.read(first, first + self.context + 1)
        return torch.from_numpy(rows)

    @property
    def left_over(self) -> int:
        """Tokens at the end that no sample predicts."""
        return max(0, self.stop - self.start - 1) - len(self) * self.context


class TextWindows:
    """Data source: text or tokens, cut into windows for next-token prediction.

    Args:
        path: a file, a folder, a pattern, or a list of these: text files; JSON Lines, JSON, CSV, TSV or parquet,
            whose records are documents; any of these compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``); or token
            files (``.bin`` or ``.npy``, raw or with the header of llm.c or Megatron's index beside them). A folder
            with ``train`` and ``val`` files or folders is read as these splits. None takes the source of Python's
            standard library.
        vocab_size: number of token ids, at most, of the tokenizer that is trained; for token files, the
            bound of the ids.
        context: tokens that a sample predicts.
        eval_fraction: share of the tokens, at the end, that is held out; 0 holds out nothing. It does not count
            where held-out files are given or found.
        cache_dir: where tokenised text is kept; see `gatrain.data.cache.cache_root`.
        tokenizer: ``bpe`` (trained on this text), ``gpt2``, or the path of a ``tokenizer.json`` or its folder.
        text_field: field of a record that holds its text; ``a.b`` for a field in a field.
        token_dtype: how a ``.bin`` file without a header stores its numbers, in this machine's byte order.
        eval_path: held-out files, given like ``path``; the tokenizer is not trained on them.
        encoding: of text, by Python's name of it. Bytes that are none are refused, never replaced.
        format: ``auto`` (by content and name), ``text`` (read as it stands), ``jsonl``, ``json``, ``csv``, ``tsv``
            or ``parquet``.
        packed: ``joined``: a sample is one text, whatever documents it holds. ``isolated``: each document in it
            is computed as if it stood alone; batches then say which tokens are of which document, for a model
            whose forward takes ``documents`` (`gatrain.models.gpt.GPT`). The end-of-text token belongs to the
            document that it ends, and what follows it is not predicted from it.

    Attributes:
        train, eval: `TokenWindows`; ``eval`` is None if nothing is held out.
        tokenizer: decodes samples; None for token files unless it is ``gpt2`` or a file.
        report: what was read, a `DataReport`.

    Raises:
        ConfigError: an empty path.
        DataError: missing, unreadable, undecodable, empty or too short text; ids outside the vocabulary.
    """

    variable_length = False

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        vocab_size: int = 4096,
        context: int = 128,
        eval_fraction: float = 0.05,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: str = "bpe",
        text_field: str = "text",
        token_dtype: str = "uint16",
        eval_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        encoding: str = "utf-8",
        format: str = "auto",
        packed: str = "joined",
    ) -> None:
        check_lengths(context, eval_fraction)
        if packed not in PACKED:
            raise ConfigError(
                f"data.packed={packed} is not one of {', '.join(PACKED)}.{nearest(packed, PACKED)}"
            )
        self.packed = packed
        reading = Reading.checked(encoding, format, text_field)
        self.vocab_size = vocab_size
        self.context = context
        self.tokenizer: Tokenizer | None
        self._files = source_files(path, eval_path)
        self._name = "the standard library" if path is None else str(path)
        self._folder: Path | None = None
        held_out: Tokens | None = None
        if self._files is not None and _are_tokens(self._files, str(path)):
            self.tokens, held_out = _open_token_files(self._files, token_dtype, vocab_size, cache_dir)
            check_tokenizer(tokenizer, vocab_size)
            known = tokenizer == "gpt2" or own_file(tokenizer) is not None
            self.tokenizer = make_tokenizer(tokenizer, [], vocab_size) if known else None
            self._read = _token_report(self._files, self.tokens, held_out)
        else:
            folder = tokenised(self._files, vocab_size, tokenizer, reading, cache_dir)
            self.tokens = TokenFile(folder / "tokens.npy")
            if (folder / "held_out.npy").is_file():
                held_out = TokenFile(folder / "held_out.npy")
            self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
            self._read = read_report(folder)
            self._folder = folder
        self.train, self.eval = self._split(eval_fraction, held_out)
        if packed == "isolated":
            if self.tokenizer is None:
                raise ConfigError(
                    "data.packed=isolated must know which token ends a document, and token files do not say "
                    "so. Name their tokenizer: data.tokenizer=gpt2, or the path of its tokenizer.json."
                )
            self._end_of_text = self.tokenizer.end_of_text
            # on the object: with joined samples torch's own collate serves, and whole batches are read at once
            self.collate, self.deterministic_collate = self._isolated, True

    def _isolated(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        return isolated(torch.stack(list(samples)), self._end_of_text)

    @cached_property
    def report(self) -> DataReport:
        """What was read, and what was left out of it."""
        omissions = [*left_out(self._files), *self._read.omissions]
        if self._folder is not None and (longer := longer_documents(self._folder, self.context)):
            omissions.append(Omission(GO_ON, longer))  # nothing of them is lost, so it has no share
        if self._folder is not None and self.packed == "isolated":
            omissions.append(Omission(FIRST_TOKENS, self._read.items))
        over = self.train.left_over + (self.eval.left_over if self.eval is not None else 0)
        if over:
            total = (
                self.train.stop - self.train.start + (self.eval.stop - self.eval.start if self.eval else 0)
            )
            omissions.append(Omission(LEFT_OVER, over, of=total))
        return finished(self._read, omissions, self._files)

    def _split(
        self, eval_fraction: float, held_out: Tokens | None
    ) -> tuple[TokenWindows, TokenWindows | None]:
        cut = self.tokens.size if held_out is not None else round(self.tokens.size * (1 - eval_fraction))
        train = TokenWindows(self.tokens, 0, cut, self.context)
        if held_out is not None:
            tested = TokenWindows(held_out, 0, held_out.size, self.context)
        else:
            tested = TokenWindows(self.tokens, cut, self.tokens.size, self.context)
        wants_eval = held_out is not None or eval_fraction > 0
        if len(train) == 0 or (wants_eval and len(tested) == 0):
            part = "training" if len(train) == 0 else "held-out"
            of = held_out if held_out is not None and part == "held-out" else self.tokens
            where = "the held-out files give" if of is held_out else f"{self._name} gives"
            given = "" if held_out is not None else f" with data.eval_fraction={eval_fraction}"
            raise DataError(
                f"{where} {of.size} tokens, too few for one {part} sample of {self.context} + "
                f"1 tokens{given}. Give more text, or a smaller data.context"
                + (", or data.eval_fraction=0." if part == "held-out" and held_out is None else ".")
            )
        return train, tested if wants_eval else None

    def unigram_loss(self) -> float:
        """Nats per held-out token, by the token frequencies of the train split; nan without a split."""
        if self.eval is None:
            return float("nan")
        trained = self.tokens.slices(0, self.train.stop)
        return unigram_loss(
            trained, self.eval.tokens.slices(self.eval.start, self.eval.stop), self.vocab_size
        )


def isolated(rows: Tensor, end_of_text: int) -> dict[str, Tensor]:
    """A batch that says which tokens are of which document.

    Args:
        rows: int64 ``[B, L + 1]``.
        end_of_text: the token that ends a document, and is its last one.

    Returns:
        ``tokens``, ``labels`` and ``documents``, int64 ``[B, L]`` each: labels are aligned with their
        positions, -100 where the following token is another document's; documents count from 0 in each row.
    """
    tokens, labels = rows[:, :-1], rows[:, 1:]
    ends = tokens == end_of_text
    documents = ends.cumsum(1) - ends.to(torch.int64)  # an end is of the document before it
    return {"tokens": tokens, "labels": labels.masked_fill(ends, IGNORED), "documents": documents}


def check_lengths(context: int, eval_fraction: float) -> None:
    """Refuse a context below one token or a held-out share outside [0, 1).

    Raises:
        DataError: names the value and the range.
    """
    if context < 1:
        raise DataError(f"data.context={context} is below 1, the smallest value allowed.")
    if not 0 <= eval_fraction < 1:
        raise DataError(f"data.eval_fraction={eval_fraction} is not at least 0 and below 1. Try 0.05.")


def source_files(path: Given | None, eval_path: Given | None) -> Files | None:
    """The files that are named; None for the standard library.

    Raises:
        ConfigError, DataError: nothing to read, or held-out files without files to train on.
    """
    if path is not None:
        return find_files(path, eval_path)
    if eval_path is not None:
        raise DataError(f"data.eval_path={eval_path} is given without data.path. Give both.")
    return None


def left_out(files: Files | None) -> list[Omission]:
    """What was left out on the way to the files."""
    return files.omissions.found() if files is not None else []


def finished(read: DataReport, omissions: list[Omission], files: Files | None) -> DataReport:
    """The report with everything that was left out, and the fingerprint of the files."""
    if files is None:
        fingerprint = stdlib_fingerprint(stdlib_files())[:32]
    else:
        fingerprint = content_fingerprint(list(files), files.root)
    return replace(read, omissions=tuple(omissions), fingerprint=fingerprint)


def _are_tokens(files: Files, path: str) -> bool:
    """Whether the files hold token ids; an index beside a token file belongs to it.

    Raises:
        DataError: text and tokens are mixed.
    """
    tokens = [file for file in files if plain_name(file).suffix.lower() in TOKEN_SUFFIXES]
    indices = {beside(file) for file in tokens}
    others = [file for file in files if file not in tokens and file not in indices]
    if tokens and others:
        raise DataError(
            f"data.path={path} names {len(tokens) + len(others)} files, among them the token file {tokens[0]} and "
            f"{others[0]}, which is none. Give token files or text files, for example "
            f"data.path='{tokens[0].parent}/*{tokens[0].suffix}'."
        )
    return bool(tokens)


def _open_token_files(
    files: Files, dtype: str, vocab_size: int, cache_dir: Any
) -> tuple[Tokens, Tokens | None]:
    kept = None if cache_dir is None else Path(cache_dir).expanduser()
    opened = []
    for part in (files.train, files.held_out):
        paths = [file for file in part if plain_name(file).suffix.lower() in TOKEN_SUFFIXES]
        tokens = open_tokens(paths, dtype) if paths else None
        for file in tokens.files if tokens is not None else []:
            file.check_ids(vocab_size, kept)
        opened.append(tokens)
    if opened[0] is None:
        raise DataError(
            f"{files.train[0]} is no token file, but held-out token files are given. Give both alike."
        )
    return opened[0], opened[1]


def _token_report(files: Files, tokens: Tokens, held_out: Tokens | None) -> DataReport:
    every = [*tokens.files, *(held_out.files if held_out is not None else [])]
    kinds = sorted({f"{file.layout.kind} {file.layout.dtype.name}" for file in every})
    return DataReport(
        kind=f"token files ({', '.join(kinds)})",
        files=len(every),
        size_bytes=sum(file.path.stat().st_size for file in every),
        items=sum(file.size for file in every),
        item_name="tokens",
    )
