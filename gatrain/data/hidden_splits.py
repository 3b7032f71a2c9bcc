"""Text folders in which splits lie deeper, or under longer names, than they are read as such: refused.

Read as one they would train on their own held-out text, and nothing would show it. Source code is left alone: in it
``train`` and ``test`` are ordinary names.
"""

from __future__ import annotations

import glob
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gatrain.data.compressed import plain_name
from gatrain.data.folders import shown
from gatrain.data.formats import PROGRAMS, SOURCES
from gatrain.data.splits import HELD_OUT, split_kind, split_word
from gatrain.errors import DataError


def refuse_hidden_splits(root: Path, files: Sequence[Path]) -> None:
    """
    Args:
        root: the folder that was given.
        files: found in it, and about to be read as one text.

    Raises:
        DataError: beside each other, anywhere below ``root``, lie folders such as ``en/train`` and ``en/test`` or
            files such as ``wiki.train.raw`` and ``wiki.valid.raw``; says what to type.
    """
    below: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        parts = file.relative_to(root).parts
        for depth, name in enumerate(parts):
            below[root.joinpath(*parts[:depth])][name].append(file)
    for folder, inside in below.items():
        single = {name for name, held in inside.items() if held == [folder / name]}
        folders = [name for name in inside if name not in single and not _is_source(inside[name])]
        if found := _pair(folders):
            raise _doubt(root, folder, found, "/**")
        names = [name for name in single if _suffix(Path(name)) not in SOURCES]
        in_project = any(_suffix(Path(name)) in PROGRAMS for name in single)
        if not in_project and (found := _pair(names)):
            raise _doubt(root, folder, found, "")


def _suffix(file: Path) -> str:
    return plain_name(file).suffix.lower()


def _is_source(files: Sequence[Path]) -> bool:
    suffixes = {_suffix(file) for file in files}
    return suffixes <= SOURCES or not suffixes.isdisjoint(PROGRAMS)


def _pair(names: Iterable[str]) -> list[list[str]] | None:
    """The names to train on and those of one held-out split, the same but for the word of the split."""
    groups: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        if found := split_word(name):
            groups[found[1]][found[0]].append(name)
    for group in groups.values():
        train = [name for word, each in group.items() if split_kind(word) == "train" for name in each]
        held_out = next((group[word] for word in HELD_OUT if word in group), None)
        if train and held_out:
            return [train, held_out]
    return None


def _doubt(root: Path, folder: Path, pair: Sequence[Sequence[str]], all_in: str) -> DataError:
    named = " and ".join(shown((folder / names[0]).relative_to(root)) for names in pair)
    where = folder if folder == root or not all_in else root / "**"
    keys = (
        shlex.quote(f"{key}={where}/{_pattern(names)}{all_in}")
        for key, names in zip(("data.path", "data.eval_path"), pair, strict=True)
    )
    return DataError(
        f"data.path={shown(root)} holds {named}: these look like splits, and read as one they would be trained on "
        f"alike. Name them: {' '.join(keys)} (patterns and lists are fine), or read all of them as one with "
        f"{shlex.quote(f'data.path={root}/**')}."
    )


def _pattern(names: Sequence[str]) -> str:
    """What matches all names: the only one, or anything around the word of the split."""
    if len(names) == 1:
        return glob.escape(names[0])
    spelled = [
        name[name.lower().index(found[0]) :][: len(found[0])] for name in names if (found := split_word(name))
    ]
    word = min(spelled, key=len)  # of train and training, the one that is in both
    if not all(each.startswith(word) for each in spelled):
        word = "".join(f"[{letter.lower()}{letter.upper()}]" for letter in word)
    return f"*{word}*"
