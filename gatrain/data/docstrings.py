"""Pairs that belong together and that every machine has: docstring and code of functions of Python's library."""

from __future__ import annotations

import ast
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gatrain.data.cache import build_once
from gatrain.data.digits import TensorSamples
from gatrain.data.stdlib import stdlib_files, stdlib_fingerprint
from gatrain.data.text import check_lengths
from gatrain.errors import DataError

FEWEST_WORDS = 4
"""Of a docstring: shorter ones, such as "See above.", belong to many functions."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class Docstrings:
    """Data source: docstrings int64 ``[words]`` with their functions, less the docstring, int64 ``[code_words]``.

    Words are parts of identifiers and of sentences in small letters (``getFile_name`` has three), by their hash in
    1 to ``vocab_size`` - 1, padded with 0. Each pair of equal words is there once. The held-out share is the end,
    which comes from other files than the rest.

    Args:
        words, code_words: how many of them are kept, from the start.
        vocab_size: different numbers, 0 included.
        eval_fraction: share that is held out.

    Raises:
        DataError: no sources in this Python, or a fraction outside [0, 1).
    """

    def __init__(
        self, words: int = 48, code_words: int = 96, vocab_size: int = 8192, eval_fraction: float = 0.1
    ) -> None:
        check_lengths(min(words, code_words, vocab_size - 1), eval_fraction)
        files = stdlib_files()

        def build(folder: Path) -> None:
            found = dict.fromkeys(_pairs(files))
            if not found:
                raise DataError("no function of this Python's standard library has a docstring.")
            numbers = [
                (_numbers(docstring, words, vocab_size), _numbers(code, code_words, vocab_size))
                for docstring, code in found
            ]
            for name, column in zip(("docstrings", "codes"), zip(*numbers, strict=True), strict=True):
                np.save(folder / f"{name}.npy", np.stack(column))

        key = {"files": stdlib_fingerprint(files), "sizes": [words, code_words, vocab_size]}
        folder = build_once("docstrings", key, build)
        docstrings, codes = (
            torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64))
            for name in ("docstrings", "codes")
        )
        cut = round(len(codes) * (1 - eval_fraction))
        self.train = TensorSamples(docstrings[:cut], codes[:cut])
        self.eval = TensorSamples(docstrings[cut:], codes[cut:]) if cut < len(codes) else None


def _pairs(files: Sequence[Path]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Words of the docstring and of the rest of each function that has both."""
    for path in files:
        try:
            source = path.read_bytes().decode()
            with warnings.catch_warnings():  # of escapes in the sources of others
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
                continue
            docstring = words_of(ast.get_docstring(node) or "")
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            code = words_of("\n".join([*head, *lines[node.body[1].lineno - 1 : node.end_lineno]]))
            if len(docstring) >= FEWEST_WORDS and code:
                yield docstring, code


def words_of(text: str) -> tuple[str, ...]:
    """Parts of identifiers and words, in small letters."""
    return tuple(word.lower() for word in _WORD.findall(text))


def _numbers(words: Sequence[str], count: int, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """int32 ``[count]``."""
    numbers = [zlib.crc32(word.encode()) % (vocab_size - 1) + 1 for word in words[:count]]
    return np.array(numbers + [0] * (count - len(numbers)), dtype=np.int32)
