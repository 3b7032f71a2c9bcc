"""Windows of equal length over one long sequence of tokens: the data of a language model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatrain.data.cache import build_once
from gatrain.data.documents import files_fingerprint, find_files, pieces
from gatrain.data.stdlib import stdlib_files, stdlib_fingerprint
from gatrain.data.token_file import TokenFile, TokenWriter, smallest_dtype, unigram_loss
from gatrain.data.tokenizer import Tokenizer, check_tokenizer, make_tokenizer, own_file, tokenizer_key
from gatrain.errors import DataError

TOKEN_SUFFIXES = (".bin", ".npy")
TRAINING_CHARS = 200_000_000
"""Text that a tokenizer is trained on, at most, taken evenly from the whole."""


class TokenWindows:
    """Map-style dataset: item ``i`` is int64 ``[context + 1]``, tokens ``i*context`` to ``(i+1)*context``.

    Neighbours share one token, so that every token but the first is predicted exactly once.
    """

    deterministic = True

    def __init__(self, tokens: TokenFile, start: int, stop: int, context: int) -> None:
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
        rows = np.empty((len(indices), self.context + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            first = self.start + index * self.context
            row[:] = self.tokens.array[first : first + self.context + 1]
        return list(torch.from_numpy(rows).unbind())


class TextWindows:
    """Data source: text or tokens, cut into windows for next-token prediction.

    Args:
        path: a text file, a folder or pattern of text files, ``.jsonl`` files, or one token file (``.bin`` or
            ``.npy``). None takes the source of Python's standard library.
        vocab_size: number of token ids, at most, of the tokenizer that is trained; for token files, the
            bound of the ids.
        context: tokens that a sample predicts.
        eval_fraction: share of the tokens, at the end, that is held out; 0 holds out nothing.
        cache_dir: where tokenised text is kept; see `gatrain.data.cache.cache_root`.
        tokenizer: ``bpe`` (trained on this text), ``gpt2``, or the path of a ``tokenizer.json`` or its folder.
        text_field: field of a JSON line that holds its text.
        token_dtype: how a ``.bin`` file stores its numbers.

    Attributes:
        train, eval: `TokenWindows`; ``eval`` is None if nothing is held out.
        tokenizer: decodes samples; None for token files unless it is ``gpt2`` or a file.

    Raises:
        DataError: missing, unreadable, empty or too short text; ids outside the vocabulary.
    """

    variable_length = False

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        vocab_size: int = 4096,
        context: int = 128,
        eval_fraction: float = 0.05,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: str = "bpe",
        text_field: str = "text",
        token_dtype: str = "uint16",
    ) -> None:
        check_lengths(context, eval_fraction)
        self.vocab_size = vocab_size
        self.context = context
        self.tokenizer: Tokenizer | None
        files = None if path is None else find_files(str(path))
        token_files = [file for file in files or [] if file.suffix in TOKEN_SUFFIXES]
        if token_files and len(files or []) > 1:
            raise DataError(
                f"data.path={path} names {len(files or [])} files, among them the token file "
                f"{token_files[0]}. Give one token file, or text files only."
            )
        if token_files:
            self.tokens = TokenFile(token_files[0], token_dtype)
            self.tokens.check_ids(vocab_size)
            check_tokenizer(tokenizer, vocab_size)
            known = tokenizer == "gpt2" or own_file(tokenizer) is not None
            self.tokenizer = make_tokenizer(tokenizer, [], vocab_size) if known else None
        else:
            folder = tokenised(files, vocab_size, tokenizer, text_field, cache_dir)
            self.tokens = TokenFile(folder / "tokens.npy")
            self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.train, self.eval = self._split(
            eval_fraction, "the standard library" if path is None else str(path)
        )

    def _split(self, eval_fraction: float, name: str) -> tuple[TokenWindows, TokenWindows | None]:
        cut = round(self.tokens.size * (1 - eval_fraction))
        train = TokenWindows(self.tokens, 0, cut, self.context)
        held_out = TokenWindows(self.tokens, cut, self.tokens.size, self.context)
        if len(train) == 0 or (eval_fraction > 0 and len(held_out) == 0):
            part = "training" if len(train) == 0 else "held-out"
            raise DataError(
                f"{name} gives {self.tokens.size} tokens, too few for one {part} sample of {self.context} + "
                f"1 tokens with data.eval_fraction={eval_fraction}. Give more text, or a smaller data.context"
                + ("." if part == "training" else ", or data.eval_fraction=0.")
            )
        return train, held_out if eval_fraction > 0 else None

    def unigram_loss(self) -> float:
        """Nats per held-out token, by the token frequencies of the train split; nan without a split."""
        if self.eval is None:
            return float("nan")
        array = self.tokens.array
        return unigram_loss([array[: self.train.stop]], [array[self.eval.start :]], self.vocab_size)


def check_lengths(context: int, eval_fraction: float) -> None:
    """Refuse a context below one token or a held-out share outside [0, 1).

    Raises:
        DataError: names the value and the range.
    """
    if context < 1:
        raise DataError(f"data.context={context} is below 1, the smallest value allowed.")
    if not 0 <= eval_fraction < 1:
        raise DataError(f"data.eval_fraction={eval_fraction} is not at least 0 and below 1. Try 0.05.")


def tokenised(
    files: list[Path] | None,
    vocab_size: int,
    kind: str,
    text_field: str,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The cache folder with ``tokens.npy`` and ``tokenizer.json`` of ``files`` (None: the standard library).

    Documents follow one another, each ended by the end-of-text token. Memory holds some pieces of text and
    the tokenizer's word counts, whatever the size of the files.
    """
    check_tokenizer(kind, vocab_size)
    sources, key = text_sources(files)

    def build(folder: Path) -> None:
        tokenizer = make_tokenizer(kind, training_texts(sources, text_field), vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        ends: list[bool] = []
        with TokenWriter(folder / "tokens.npy", smallest_dtype(tokenizer.size)) as writer:
            for ids in tokenizer.encode_all(_note_ends(sources, text_field, ends)):
                writer.write(ids)
                if ends.pop(0):
                    writer.write([tokenizer.end_of_text])
        if writer.size == 0:
            raise DataError(
                f"no text in {sources[0]}{' and the other files' if len(sources) > 1 else ''}. "
                "Give a file with text in it."
            )

    key = {**key, "vocab_size": vocab_size, "tokenizer": tokenizer_key(kind), "text_field": text_field}
    return build_once("text", key, build, cache_dir)


def text_sources(files: list[Path] | None) -> tuple[list[Path], dict[str, Any]]:
    """The files to read, and what identifies their contents."""
    if files is None:
        sources = stdlib_files()
        return sources, {"stdlib": stdlib_fingerprint(sources)}
    return files, {"files": files_fingerprint(files)}


def training_texts(files: list[Path], text_field: str) -> Iterator[str]:
    """The text to train a tokenizer on: everything, or every n-th piece of a large corpus."""
    total = sum(file.stat().st_size for file in files)
    step = -(-total // TRAINING_CHARS) or 1
    return islice((text for file in files for text, _ in pieces(file, text_field)), 0, None, step)


def _note_ends(files: list[Path], text_field: str, ends: list[bool]) -> Iterator[str]:
    """The pieces of all files; ``ends`` queues whether each ends its document, for the reader behind."""
    for file in files:
        for text, is_end in pieces(file, text_field):
            ends.append(is_end)
            yield text
