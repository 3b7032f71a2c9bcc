"""Texts of different lengths, padded in the batch, of which only a part is trained on.

With such data the loss's denominator differs from sample to sample: a mean of micro-batch means would be
wrong.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatrain.data.cache import build_once
from gatrain.data.documents import JSONL_SUFFIXES, find_files, json_lines, pieces, string_field
from gatrain.data.text import check_lengths, text_sources, training_texts
from gatrain.data.token_file import Array, TokenFile, TokenWriter, smallest_dtype, unigram_loss
from gatrain.data.tokenizer import Tokenizer, check_tokenizer, make_tokenizer, tokenizer_key
from gatrain.errors import DataError

IGNORED = -100
"""Label of a position that is not trained on; the default ``ignore_index`` of PyTorch's cross-entropy."""

PADDED_TO = 8
"""Batches are padded to a multiple of this many positions, which matrix units like, up to the context."""

SHORTEST = 4
"""Texts of fewer tokens, their two end-of-text tokens included, are left out."""

PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")


class PaddedSamples:
    """Map-style dataset: dicts of ``tokens`` and ``labels``, both int64 ``[length]``, one entry a position.

    ``labels[t]`` is the token that follows ``tokens[t]``: labels are aligned with positions already and must
    not be shifted again. It is -100 where the following token belongs to the prompt.
    """

    deterministic = True

    def __init__(
        self, tokens: TokenFile, offsets: Array, prompts: Array, prompt_fraction: float, context: int
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.context = context
        sizes = np.diff(offsets)
        fraction = np.floor(sizes * prompt_fraction).astype(np.int64)
        # At least one token of every sample is trained on.
        self.prompts: Array = np.minimum(np.where(prompts > 0, prompts, fraction), sizes - 1)

    @property
    def lengths(self) -> Array:
        """Positions of every sample, ``[len(self)]``."""
        return np.diff(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ids = torch.from_numpy(
            self.tokens.array[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        )
        labels = ids[1:].clone()
        labels[: max(0, int(self.prompts[index]) - 1)] = IGNORED
        return {"tokens": ids[:-1], "labels": labels}

    def trained_tokens(self, cap: int = 50_000_000) -> Array:
        """The tokens that serve as labels, of the first ``cap`` tokens."""
        start = int(self.offsets[0])
        flat = self.tokens.array[start : min(int(self.offsets[-1]), start + cap)]
        edges = np.zeros(len(flat) + 1, dtype=np.int8)
        firsts = self.offsets[:-1] + np.maximum(self.prompts, 1) - start
        np.add.at(edges, firsts[firsts < len(flat)], 1)
        ends = self.offsets[1:] - start
        np.add.at(edges, ends[ends < len(flat)], -1)
        chosen: Array = flat[np.cumsum(edges[:-1]) > 0]
        return chosen


class PaddedText:
    """Data source: paragraphs of text, or pairs of prompt and completion, one sample each.

    Args:
        path: as for `gatrain.data.TextWindows`, without token files. JSON Lines with fields ``prompt`` and
            ``completion`` give one sample a line, and only completions are trained on. None takes the source
            of Python's standard library.
        vocab_size: number of token ids, at most.
        context: most positions of a sample. Longer paragraphs are cut into several samples; of longer pairs
            the beginning of the prompt is left out.
        prompt_fraction: for paragraphs: the share of each, at its beginning, that is not trained on.
        eval_fraction: share of the samples, at the end, that is held out.
        cache_dir, tokenizer, text_field: as for `gatrain.data.TextWindows`.

    Attributes:
        train, eval: `PaddedSamples`; ``eval`` is None if nothing is held out.

    Raises:
        DataError: missing, unreadable or empty text.
    """

    variable_length = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        vocab_size: int = 4096,
        context: int = 128,
        prompt_fraction: float = 0.7,
        eval_fraction: float = 0.05,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: str = "bpe",
        text_field: str = "text",
    ) -> None:
        check_lengths(context, eval_fraction)
        if not 0 <= prompt_fraction < 1:
            raise DataError(f"data.prompt_fraction={prompt_fraction} is not at least 0 and below 1. Try 0.7.")
        if context + 1 < SHORTEST:
            raise DataError(f"data.context={context} is below {SHORTEST - 1}, the smallest for padded text.")
        self.vocab_size = vocab_size
        self.context = context
        files = None if path is None else find_files(str(path))
        folder = tokenised_samples(files, vocab_size, context, tokenizer, text_field, cache_dir)
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        tokens = TokenFile(folder / "tokens.npy")
        offsets, prompts = np.load(folder / "offsets.npy"), np.load(folder / "prompts.npy")
        total = len(prompts)
        cut = round(total * (1 - eval_fraction))
        if cut == 0 or (eval_fraction > 0 and cut == total):
            raise DataError(
                f"{path or 'the standard library'} gives {total} samples, too few to hold out "
                f"data.eval_fraction={eval_fraction} of them. Give more text, or data.eval_fraction=0."
            )
        self.train = PaddedSamples(tokens, offsets[: cut + 1], prompts[:cut], prompt_fraction, context)
        self.eval = (
            PaddedSamples(tokens, offsets[cut:], prompts[cut:], prompt_fraction, context)
            if eval_fraction > 0
            else None
        )

    deterministic_collate = True

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad ``tokens`` with 0 and ``labels`` with -100 to the longest sample: both int64 ``[B, L]``.

        Padding stands at the end, so causal attention never looks at it from a real position.
        """
        longest = max(len(sample["tokens"]) for sample in samples)
        length = max(longest, min(self.context, -(-longest // PADDED_TO) * PADDED_TO))
        tokens = torch.zeros(len(samples), length, dtype=torch.int64)
        labels = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample["tokens"])] = sample["tokens"]
            labels[row, : len(sample["labels"])] = sample["labels"]
        return {"tokens": tokens, "labels": labels}

    def unigram_loss(self) -> float:
        """Nats per held-out label, by the label frequencies of the train split; nan without a split."""
        if self.eval is None:
            return float("nan")
        return unigram_loss([self.train.trained_tokens()], [self.eval.trained_tokens()], self.vocab_size)


def tokenised_samples(
    files: list[Path] | None,
    vocab_size: int,
    context: int,
    kind: str,
    text_field: str,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The cache folder with ``tokens.npy`` (flat), ``offsets.npy`` (int64 ``[samples + 1]``), ``prompts.npy``
    (prompt tokens of each sample, 0 for paragraphs) and ``tokenizer.json``."""
    check_tokenizer(kind, vocab_size)
    sources, key = text_sources(files)
    pairs = [file for file in sources if _holds_pairs(file)]
    plain = [file for file in sources if file not in pairs]

    def build(folder: Path) -> None:
        pair_texts = (text for file in pairs for pair in _pairs(file) for text in pair)
        texts = chain(training_texts(plain, text_field), pair_texts)
        tokenizer = make_tokenizer(kind, texts, vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        offsets, prompts = array("q", [0]), array("q")
        with TokenWriter(folder / "tokens.npy", smallest_dtype(tokenizer.size)) as writer:
            samples = chain(
                _paragraph_samples(plain, text_field, tokenizer, context),
                _pair_samples(pairs, tokenizer, context),
            )
            for ids, prompt in samples:
                writer.write(ids)
                offsets.append(writer.size)
                prompts.append(prompt)
        if not prompts:
            raise DataError(
                f"no text of at least {SHORTEST - 2} tokens in {sources[0]}"
                f"{' and the other files' if len(sources) > 1 else ''}. Give a file with text in it."
            )
        np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
        np.save(folder / "prompts.npy", np.asarray(prompts, dtype=np.int64))

    options = {"vocab_size": vocab_size, "context": context, "text_field": text_field}
    options["tokenizer"] = tokenizer_key(kind)
    return build_once("padded", {**key, **options}, build, cache_dir)


def _paragraph_samples(
    files: list[Path], text_field: str, tokenizer: Tokenizer, context: int
) -> Iterator[tuple[list[int], int]]:
    """(tokens, 0) of each paragraph between two end-of-text tokens, cut to ``context + 1`` tokens at most."""
    paragraphs = (
        paragraph.rstrip()
        for file in files
        for text, _ in pieces(file, text_field)
        for paragraph in PARAGRAPH_END.split(text)
    )
    end = tokenizer.end_of_text
    for ids in tokenizer.encode_all(paragraphs):
        ids = [end, *ids, end]
        for start in range(0, len(ids), context + 1):
            if len(part := ids[start : start + context + 1]) >= SHORTEST:
                yield part, 0


def _pair_samples(files: list[Path], tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, prompt tokens) of each pair; of what is too long, the beginning of the prompt is left out."""
    end = tokenizer.end_of_text
    for file in files:
        for prompt_text, completion_text in _pairs(file):
            completion = [*tokenizer.encode(completion_text), end][:context]
            room = context + 1 - len(completion)
            prompt = [end, *tokenizer.encode(prompt_text)][-room:]
            yield prompt + completion, len(prompt)


def _holds_pairs(file: Path) -> bool:
    """True if the first record of a JSON Lines file has a ``prompt`` or a ``completion``."""
    if file.suffix.lower() not in JSONL_SUFFIXES:
        return False
    first: dict[str, Any] = next((record for _, record in json_lines(file)), {})
    return "prompt" in first or "completion" in first


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for number, record in json_lines(file):
        yield (
            string_field(record, "prompt", file, number),
            string_field(record, "completion", file, number),
        )
