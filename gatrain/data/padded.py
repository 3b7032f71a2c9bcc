"""Texts of different lengths, padded in the batch, of which only a part is trained on.

With such data the loss's denominator differs from sample to sample: a mean of micro-batch means would be
wrong.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gatrain.data.cache import build_once
from gatrain.data.documents import Corpus
from gatrain.data.folders import shown
from gatrain.data.formats import Reading
from gatrain.data.records import CHAT_FIELDS, field_names, has_field, records, text_of
from gatrain.data.report import DataReport
from gatrain.data.text import check_lengths, finished, left_out, source_files
from gatrain.data.text_files import Files
from gatrain.data.token_file import TokenFile, TokenWriter, smallest_dtype, unigram_loss
from gatrain.data.token_layout import Array
from gatrain.data.tokenised import check_unchanged, no_text, read_report, text_sources, write_report
from gatrain.data.tokenizer import Tokenizer, check_tokenizer, make_tokenizer, tokenizer_key
from gatrain.errors import DataError
from gatrain.labels import IGNORED

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
        path: as for `gatrain.data.TextWindows`, without token files. Records with fields ``prompt`` and
            ``completion`` give one sample each, and only completions are trained on. None takes the source
            of Python's standard library.
        vocab_size: number of token ids, at most.
        context: most positions of a sample. Longer paragraphs are cut into several samples; of longer pairs
            the beginning of the prompt is left out.
        prompt_fraction: for paragraphs: the share of each, at its beginning, that is not trained on.
        eval_fraction: share of the samples, at the end, that is held out.
        cache_dir, tokenizer, text_field, eval_path, encoding, format: as for `gatrain.data.TextWindows`.
        prompt_field, completion_field: fields of a record that hold the two, where they have other names.

    Attributes:
        train, eval: `PaddedSamples`; ``eval`` is None if nothing is held out.
        report: what was read, and how much of it the context cut, a `DataReport`.

    Raises:
        DataError: missing, unreadable or empty text.
    """

    variable_length = True

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        vocab_size: int = 4096,
        context: int = 128,
        prompt_fraction: float = 0.7,
        eval_fraction: float = 0.05,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: str = "bpe",
        text_field: str = "text",
        eval_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        encoding: str = "utf-8",
        format: str = "auto",
        prompt_field: str = "prompt",
        completion_field: str = "completion",
    ) -> None:
        check_lengths(context, eval_fraction)
        reading = Reading.checked(encoding, format, text_field)
        if not 0 <= prompt_fraction < 1:
            raise DataError(f"data.prompt_fraction={prompt_fraction} is not at least 0 and below 1. Try 0.7.")
        if context + 1 < SHORTEST:
            raise DataError(f"data.context={context} is below {SHORTEST - 1}, the smallest for padded text.")
        self.vocab_size = vocab_size
        self.context = context
        self._files = source_files(path, eval_path)
        pairs = PairFields(prompt_field, completion_field)
        folder = tokenised_samples(self._files, vocab_size, context, tokenizer, reading, pairs, cache_dir)
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self._read = read_report(folder)
        tokens = TokenFile(folder / "tokens.npy")
        offsets, prompts = np.load(folder / "offsets.npy"), np.load(folder / "prompts.npy")
        total = len(prompts)
        held_out = int(np.load(folder / "held_out.npy"))
        cut = total - held_out if held_out else round(total * (1 - eval_fraction))
        wants_eval = held_out > 0 or eval_fraction > 0
        if cut == 0 or (wants_eval and cut == total):
            raise DataError(
                f"{path or 'the standard library'} gives {total} samples, too few to hold out "
                f"data.eval_fraction={eval_fraction} of them. Give more text, or data.eval_fraction=0."
            )
        self.train = PaddedSamples(tokens, offsets[: cut + 1], prompts[:cut], prompt_fraction, context)
        self.eval = (
            PaddedSamples(tokens, offsets[cut:], prompts[cut:], prompt_fraction, context)
            if wants_eval
            else None
        )

    @cached_property
    def report(self) -> DataReport:
        """What was read, and what was left out of it."""
        return finished(self._read, [*left_out(self._files), *self._read.omissions], self._files)

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


@dataclass(frozen=True)
class PairFields:
    """The fields of a record that hold a prompt and its completion."""

    prompt: str = "prompt"
    completion: str = "completion"

    def in_record(self, record: dict[str, object]) -> bool:
        """Whether a record has one of them."""
        return has_field(record, self.prompt) or has_field(record, self.completion)


CUT_PARAGRAPHS = "paragraphs longer than data.context, cut into several samples"
SHORT_PARAGRAPHS = f"paragraphs of fewer than {SHORTEST - 2} tokens left out"
SHORT_ENDS = f"last tokens of cut paragraphs, fewer than {SHORTEST} at a time, left out"
CUT_PROMPTS = "prompts cut to data.context at their beginning"
CUT_COMPLETIONS = "completions cut to data.context at their end, with the end-of-text token"


def tokenised_samples(
    files: Files | None,
    vocab_size: int,
    context: int,
    kind: str,
    reading: Reading,
    fields: PairFields,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The cache folder with ``tokens.npy`` (flat), ``offsets.npy`` (int64 ``[samples + 1]``), ``prompts.npy``
    (prompt tokens of each sample, 0 for paragraphs), ``held_out.npy`` (how many samples at the end are of held-out
    files), ``tokenizer.json`` and the report."""
    check_tokenizer(kind, vocab_size)
    train, held_out, key = text_sources(files, reading)

    def build(folder: Path) -> None:
        parts = [_Part(train, reading, fields), _Part(held_out, reading, fields)]
        tokenizer = make_tokenizer(kind, parts[0].training_texts(), vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        offsets, prompts = array("q", [0]), array("q")
        counts = []
        with TokenWriter(folder / "tokens.npy", smallest_dtype(tokenizer.size)) as writer:
            for part in parts:
                before = len(prompts)
                for ids, prompt in part.samples(tokenizer, context):
                    writer.write(ids)
                    offsets.append(writer.size)
                    prompts.append(prompt)
                counts.append(len(prompts) - before)
                if part.files and not counts[-1]:
                    raise DataError(f"{no_text(part.files)} A sample has at least {SHORTEST - 2} tokens.")
        check_unchanged(files, key)
        np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
        np.save(folder / "prompts.npy", np.asarray(prompts, dtype=np.int64))
        np.save(folder / "held_out.npy", np.int64(counts[1]))
        name = "pairs" if parts[0].pairs.files and not parts[0].plain.files else "samples"
        corpora = [corpus for part in parts for corpus in (part.pairs, part.plain)]
        write_report(folder, corpora, tokenizer.met, len(prompts), name)

    options = {"vocab_size": vocab_size, "context": context, "pairs": [fields.prompt, fields.completion]}
    return build_once("padded", {**key, **options, "tokenizer": tokenizer_key(kind)}, build, cache_dir)


class _Part:
    """Files to train on or held-out files: those of pairs, and those of paragraphs."""

    def __init__(self, files: list[Path], reading: Reading, fields: PairFields) -> None:
        self.files = files
        self._fields = fields
        names = (fields.prompt.split(".")[0], fields.completion.split(".")[0])
        every = Corpus(files, reading, names)
        pairs = {file for file in files if self._holds_pairs(every, file)}
        self.pairs = Corpus([file for file in files if file in pairs], reading, names)
        self.plain = Corpus([file for file in files if file not in pairs], reading, names)

    def _holds_pairs(self, corpus: Corpus, file: Path) -> bool:
        """True if the first record has a prompt or a completion."""
        if (format := corpus.formats[file]) == "text":
            return False
        place, first = next(records(file, format, corpus.reading), ("", {}))
        is_known = self._fields.in_record(first) or has_field(first, corpus.reading.text_field)
        if first and not is_known and not any(name in first for name in CHAT_FIELDS):
            raise DataError(
                f"{file}, {place}: it has {', '.join(map(repr, field_names(first)[:20]))}, but neither "
                f"'{self._fields.prompt}' and '{self._fields.completion}' nor "
                f"'{corpus.reading.text_field}'. Name its "
                "fields: data.prompt_field=A data.completion_field=B for pairs, or data.text_field=C for "
                "whole texts."
            )
        return self._fields.in_record(first)

    def training_texts(self) -> Iterator[str]:
        return chain(
            self.plain.training_texts(), (text for pair in self._pairs(counted=False) for text in pair)
        )

    def samples(self, tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
        """(tokens, prompt tokens) of every sample; paragraphs have 0."""
        return chain(self._paragraphs(tokenizer, context), self._pair_samples(tokenizer, context))

    def _paragraphs(self, tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
        """Each paragraph between two end-of-text tokens, cut to ``context + 1`` tokens at most."""
        paragraphs = (
            paragraph.rstrip()
            for text, _ in self.plain.pieces()
            for paragraph in PARAGRAPH_END.split(text)
            if paragraph.strip()
        )
        end, omissions = tokenizer.end_of_text, self.plain.omissions
        total = cut = short = 0
        first_words: dict[str, list[str]] = {CUT_PARAGRAPHS: [], SHORT_PARAGRAPHS: []}
        ends = 0
        for ids in tokenizer.encode_all(paragraphs):
            total += 1
            ids = [end, *ids, end]
            if len(ids) > context + 1:
                cut += 1
            if len(ids) < SHORTEST:
                short += 1
            for what, found in (
                (CUT_PARAGRAPHS, len(ids) > context + 1),
                (SHORT_PARAGRAPHS, len(ids) < SHORTEST),
            ):
                if found and len(first_words[what]) < 5:
                    first_words[what].append(tokenizer.decode(ids[:16])[:40])
            for start in range(0, len(ids), context + 1):
                if len(part := ids[start : start + context + 1]) >= SHORTEST:
                    yield part, 0
                elif start:
                    ends += len(part)
        for what, count in ((CUT_PARAGRAPHS, cut), (SHORT_PARAGRAPHS, short)):
            if count:
                omissions.add(what, None, count, of=total)
                for words in first_words[what]:
                    omissions.add(what, words, 0)
        if ends:
            omissions.add(SHORT_ENDS, None, ends)

    def _pair_samples(self, tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
        """Of what is too long, the beginning of the prompt is left out, then the end of the completion."""
        end, omissions = tokenizer.end_of_text, self.pairs.omissions
        total = 0
        cut: dict[str, list[str]] = {CUT_PROMPTS: [], CUT_COMPLETIONS: []}
        counts = dict.fromkeys(cut, 0)
        for place, prompt_text, completion_text in self._placed_pairs(counted=True):
            total += 1
            completion = [*tokenizer.encode(completion_text), end]
            prompt = [end, *tokenizer.encode(prompt_text)]
            room = context + 1 - len(completion[:context])
            for what, is_cut in (
                (CUT_PROMPTS, len(prompt) > room),
                (CUT_COMPLETIONS, len(completion) > context),
            ):
                counts[what] += is_cut
                if is_cut and len(cut[what]) < 5:
                    cut[what].append(place)
            completion, prompt = completion[:context], prompt[-room:]
            yield prompt + completion, len(prompt)
        for what, count in counts.items():
            if count:
                omissions.add(what, None, count, of=total)
                for place in cut[what]:
                    omissions.add(what, place, 0)

    def _pairs(self, counted: bool) -> Iterator[tuple[str, str]]:
        return ((prompt, completion) for _, prompt, completion in self._placed_pairs(counted))

    def _placed_pairs(self, counted: bool) -> Iterator[tuple[str, str, str]]:
        omissions = self.pairs.omissions if counted else None
        names = (self._fields.prompt, self._fields.completion)
        for file in self.pairs.files:
            for place, record in records(
                file, self.pairs.formats[file], self.pairs.reading, omissions, names
            ):
                prompt = text_of(record, names[0], file, place, "data.prompt_field")
                completion = text_of(record, names[1], file, place, "data.completion_field")
                if omissions is not None:
                    for text, name in ((prompt, "prompts"), (completion, "completions")):
                        if not text:
                            omissions.add(f"empty {name}, kept", f"{shown(file.name)}, {place}")
                self.pairs.documents += counted
                yield f"{shown(file.name)}, {place}", prompt, completion
