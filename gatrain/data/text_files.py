"""Which files a text or token source reads: those to train on, those held out, and what is left out of folders."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatrain.data.compressed import plain_name
from gatrain.data.folders import FILE_TWICE, find, require_path, shown
from gatrain.data.formats import UNREAD_SUFFIXES
from gatrain.data.hidden_splits import refuse_hidden_splits
from gatrain.data.report import Omissions
from gatrain.data.splits import split_kind
from gatrain.errors import ConfigError, DataError

HELD_OUT_ELSEWHERE = "files of data.eval_path left out of the training data"
BESIDE = "files beside the splits, not read"

_DATA_SUFFIXES = frozenset(
    (".bin", ".npy", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".pq", ".json", ".txt", ".idx")
)
"""Only files of such names are splits by their name: a `train.py` beside an `eval.py` is source code."""
_NUMBERS = re.compile(r"[\W\d_]+|\bof\b")
_ORDER = ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")
"""Which held-out split is taken where there are several."""

_GIVE = (
    "Give a text file, a folder of text files, a pattern such as 'texts/**/*.md' (in quotes), a .jsonl, "
    ".json, .csv or "
    ".parquet file, or token files (.bin or .npy)."
)

Given = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Sources spell it out in their signature, where composition reads that digits and underscores are a name."""


@dataclass(frozen=True)
class Files:
    """What a source reads.

    Attributes:
        train, held_out: files, sorted; ``held_out`` is empty where the end of the training data is held out.
        omissions: what was left out on the way to them.
        root: the folder that the files were found in, if it was one.
    """

    train: list[Path]
    held_out: list[Path]
    omissions: Omissions = field(default_factory=Omissions)
    root: Path | None = None

    def __iter__(self) -> Any:
        return iter([*self.train, *self.held_out])


def find_files(path: Given, eval_path: Given | None = None) -> Files:
    """The files of ``data.path`` and ``data.eval_path``: each a file, a folder, a pattern, or a list of these.

    A folder with splits by their usual names (``train.bin`` and ``val.bin``, ``train-00000-of-00010.parquet``, or
    folders ``train/`` and ``validation/``) is read as such.

    Raises:
        ConfigError, DataError: an empty path, nothing there, or splits that are not certain.
    """
    omissions = Omissions()
    found = _all(path, "data.path", omissions)
    root = None
    if isinstance(path, str | os.PathLike) and (folder := require_path(path)).is_dir():
        root = folder.absolute()
    held_out = [] if eval_path is None else _all(eval_path, "data.eval_path", omissions)
    if root is not None:
        found, split_off = _split(root, found, omissions, eval_path is not None)
        held_out = held_out or split_off
        if not held_out:
            refuse_hidden_splits(root, found)
    held = {os.path.realpath(file) for file in held_out}
    train = [file for file in found if os.path.realpath(file) not in held]
    for file in found:
        if os.path.realpath(file) in held:
            omissions.add(HELD_OUT_ELSEWHERE, shown(file.name))
    if not train:
        raise DataError(
            f"every file of data.path={_shown(path)} is held out by data.eval_path={_shown(eval_path)}. Nothing is "
            "left to train on."
        )
    return Files(train, held_out, omissions, root)


def _all(given: Given, option: str, omissions: Omissions) -> list[Path]:
    many = given if not isinstance(given, str | os.PathLike) else [given]
    if not isinstance(many, Sequence) or not many:
        raise ConfigError(
            f"{option}={given!r} names no file. Give a file, a folder, a pattern, or a list of these."
        )
    found: list[Path] = []
    seen: set[str] = set()
    for each in many:
        try:
            files = find(each, omissions, option)
        except DataError as error:
            raise DataError(f"{error} {_GIVE}" if "does not exist" in str(error) else str(error)) from None
        if require_path(each, option).is_dir():
            files = _readable(each, files, omissions)
        for file in files:
            real = os.path.realpath(file)
            if real in seen:
                omissions.add(FILE_TWICE, shown(file.name))
                continue
            seen.add(real)
            found.append(file)
    return found


def _readable(folder: Any, files: list[Path], omissions: Omissions) -> list[Path]:
    """Without images, recordings and compiled code, which are counted by their suffix."""
    kept = []
    left_out = Omissions()
    for file in files:
        suffix = file.suffix.lower()
        if suffix in UNREAD_SUFFIXES:
            left_out.add(f"files called {suffix} left out, which hold no text", shown(file.name))
        else:
            kept.append(file)
    for each in left_out.found():
        omissions.add(each.what, None, each.count, of=len(files))
        for example in each.examples:
            omissions.add(each.what, example, 0)
    if not kept:
        what = "; ".join(f"{each.count} {each.what}" for each in left_out.found())
        raise DataError(f"{_shown(folder)} holds no file to read as text ({what}).")
    return kept


def _split(
    root: Path, files: list[Path], omissions: Omissions, held_out_is_given: bool
) -> tuple[list[Path], list[Path]]:
    """The files to train on and those held out, by the names of folders or files in ``root``."""
    tops = {file: file.relative_to(root).parts[0] for file in files if len(file.relative_to(root).parts) > 1}
    kinds = {split_kind(top) for top in tops.values()}
    by_folder = {"train", "held-out"} <= kinds
    words: dict[Path, str | None]
    if by_folder:
        words = {file: top.lower() if split_kind(top) else None for file, top in tops.items()}
    else:
        words = {file: _split_word(file) for file in files}
    train = [file for file in files if (word := words.get(file)) and split_kind(word) == "train"]
    held_out = [file for file in files if (word := words.get(file)) and split_kind(word) == "held-out"]
    if not held_out or (held_out_is_given and not train):
        return files, []
    known = {*train, *held_out}
    others = [file for file in files if file not in known]
    if not train and not others:
        return files, []  # nothing but held-out files: they were named on purpose
    alike = {plain_name(file).suffix for file in train or held_out}
    if not by_folder and (not train or any(plain_name(file).suffix in alike for file in others)):
        raise DataError(
            f"data.path={shown(root)} holds {_names(root, [*train, *held_out, *others])}: these look "
            "like splits, and "
            "which to train on is not certain. Name them: "
            f"{shlex.quote(f'data.path={others[0] if others else train[0]}')} "
            f"{shlex.quote(f'data.eval_path={held_out[0]}')} (patterns and lists are fine), or read all "
            "of them as one "
            f"with {shlex.quote(f'data.path={root}/**')}."
        )
    first = min((words[file] or "" for file in held_out), key=_ORDER.index)
    chosen = [file for file in held_out if words[file] == first]
    read = {*train, *chosen}
    for file in files:
        if file not in read:
            omissions.add(BESIDE, shown(file.relative_to(root)), of=len(files))
    return train, chosen


def _split_word(file: Path) -> str | None:
    """The split that a file's name tells: ``val`` of ``fineweb_val_000001.bin``; None for ``train.py``."""
    name = plain_name(file)
    if name.suffix.lower() not in _DATA_SUFFIXES:
        return None
    words = [word for word in _NUMBERS.split(name.stem.lower()) if word]
    found = [word for word in words if split_kind(word)]
    is_prose = name.suffix.lower() in (".txt", ".json")
    if len(found) != 1 or (is_prose and len(words) > 1):
        return None
    return found[0]


def _names(root: Path, files: Sequence[Path]) -> str:
    names = [shown(file.relative_to(root)) for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shown(given: Any) -> str:
    return shown(given) if isinstance(given, str | os.PathLike) else str([str(each) for each in given or []])
