"""Folders and files that are splits by their names: recognised, or refused, and never taken for classes or text."""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatrain.data.folders import shown, subfolders
from gatrain.data.report import Omissions
from gatrain.errors import DataError

BESIDE = "folders beside the splits, not read"

_TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")
"""In the order in which they are taken where there are several."""

_SPLIT_WORDS = {
    *_TRAIN, *HELD_OUT, "trainval", "trn", "tst", "validate", "development", "holdout", "heldout", "fold", "folds",
}  # fmt: skip
_COMPOUNDS = r"(train|training|val|valid|validation|eval|dev|test|testing)(set|data|split|dir|images|imgs)"
_FILLERS = {
    "set", "sets", "data", "dataset", "split", "part", "folder", "dir", "images", "image", "imgs", "img", "pics",
    "seg", "pred", "x", "y", "all", "full", "small", "mini", "tiny", "large", "big", "new", "old", "raw", "clean",
    "final", "subset", "sub", "partial", "sample", "samples", "crop", "crops", "my", "the", "in", "out", "v", "r",
    "real",
}  # fmt: skip
_WRAPPERS = {"images", "image", "imgs", "img", "data", "dataset"}
"""Folders that hold the splits in usual layouts, such as ``images/train`` beside ``labels/train``."""


@dataclass(frozen=True)
class Splits:
    """The folders of the two splits. ``held_out`` is None where there is only one to train on."""

    train: Path
    held_out: Path | None


def split_kind(name: str) -> str | None:
    """``"train"`` or ``"held-out"`` where the name is the usual one of a split, in any case; else None."""
    plain = name.lower()
    return "train" if plain in _TRAIN else "held-out" if plain in HELD_OUT else None


def looks_like_split(name: str) -> bool:
    """Whether such a name is a split's, perhaps with a number or a word that says nothing: ``train1``,
    ``test_set``, ``seg_train``. A class such as ``bullet train`` or ``test tube`` is none."""
    words = _words(name)
    return any(word in _SPLIT_WORDS for word in words) and all(
        word in _SPLIT_WORDS or word in _FILLERS for word in words
    )


def split_word(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(the word of a split, the other words) of a name with one such word; fillers do not count.

    ``partial-train`` and ``test`` leave the same, and so do ``wiki.train.raw`` and ``wiki.valid.raw``.
    """
    words = _words(name)
    of_split = [word for word in words if split_kind(word)]
    if len(of_split) != 1:
        return None
    return of_split[0], tuple(word for word in words if word != of_split[0] and word not in _FILLERS)


def splits(root: Path, omissions: Omissions, option: str = "data.path") -> Splits | None:
    """The split folders in ``root``, or in its only folder, or in its folder ``images``; None where there are none.

    Folders beside them are counted as not read.

    Raises:
        DataError: folders look like splits, but which is which is not certain.
    """
    folders = subfolders(root)
    if found := _certain(root, folders, omissions, option):
        return found
    inner = [folder for folder in folders if folder.name.lower() in _WRAPPERS or len(folders) == 1]
    for folder in inner:
        below = subfolders(folder)
        if found := _certain(folder, below, omissions, option):
            _count_beside(folders, [folder], omissions)
            return found
    _refuse_doubtful(folders, option)
    return None


def _certain(root: Path, folders: Sequence[Path], omissions: Omissions, option: str) -> Splits | None:
    train = [folder for folder in folders if split_kind(folder.name) == "train"]
    held_out = [folder for folder in folders if split_kind(folder.name) == "held-out"]
    if len(train) != 1:
        if train or held_out:
            raise _doubt([*train, *held_out], option)
        return None
    if not held_out and len(folders) > 1 and not any(_has_folders(each) for each in train):
        # beside "bus" and "car" a folder "train" without classes of its own may be the vehicle
        raise _doubt(train, option)
    held_out.sort(key=lambda folder: HELD_OUT.index(folder.name.lower()))
    first = [folder for folder in held_out if folder.name.lower() == held_out[0].name.lower()]
    if len(first) > 1:  # val and Val
        raise _doubt(first, option)
    chosen = [*train, *first]
    _count_beside(folders, chosen, omissions)
    return Splits(train[0], first[0] if first else None)


def _count_beside(folders: Iterable[Path], chosen: Sequence[Path], omissions: Omissions) -> None:
    for folder in folders:
        if folder not in chosen:
            omissions.add(BESIDE, shown(folder.name))


def _refuse_doubtful(folders: Sequence[Path], option: str) -> None:
    doubtful = [folder for folder in folders if looks_like_split(folder.name)]
    if not doubtful:
        doubtful = _same_but_for_the_split(folders)
    if doubtful:
        raise _doubt(doubtful, option)
    for folder in folders:
        if deeper := _deeper(folder):
            raise _doubt_below(folders, deeper, option)


def _deeper(folder: Path) -> list[Path]:
    """A folder to train on and a held-out one beside each other, anywhere in ``folder``."""
    below = subfolders(folder)
    for names in ([each for each in below if looks_like_split(each.name)], _same_but_for_the_split(below)):
        kinds: dict[str, Path] = {}
        for each in names:
            if word := split_word(each.name):
                kinds.setdefault(str(split_kind(word[0])), each)
        if len(kinds) == 2:
            return [kinds["train"], kinds["held-out"]]
    return next((found for each in below if not each.is_symlink() and (found := _deeper(each))), [])


def _same_but_for_the_split(folders: Sequence[Path]) -> list[Path]:
    """Folders such as ``cats_train`` and ``cats_test``, of which neither alone would be doubtful."""
    groups: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    kinds: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for folder in folders:
        words = _words(folder.name)
        of_split = [word for word in words if split_kind(word)]
        if len(of_split) == 1:
            rest = tuple(word for word in words if word != of_split[0])
            groups[rest].append(folder)
            kinds[rest].add(str(split_kind(of_split[0])))
    return [folder for rest, group in groups.items() if len(kinds[rest]) == 2 for folder in group]


def _words(name: str) -> list[str]:
    """Lower-case words of a name, without numbers: of ``seg_trainSet2`` they are seg, train and set."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.findall(r"[^\W\d_]+", spaced)
    return [part for word in words for part in _parts(word)]


def _parts(word: str) -> list[str]:
    found = re.fullmatch(_COMPOUNDS, word)
    return list(found.groups()) if found else [word]


def _has_folders(folder: Path) -> bool:
    return bool(subfolders(folder))


def _doubt_below(folders: Sequence[Path], pair: Sequence[Path], option: str) -> DataError:
    root, above = folders[0].parent, pair[0].parent
    named = " and ".join(shown(each.relative_to(root)) for each in pair)
    says = f"{option}={shown(root)} holds {named}: these look like splits, not classes."
    none = "If all in a class folder is to be trained on, write data.splits=none."
    if len(folders) == 1 and _has_folders(pair[0]):
        keys = " ".join(
            shlex.quote(f"{key}={each}")
            for key, each in zip(("data.path", "data.eval_path"), pair, strict=True)
        )
        return DataError(f"{says} Name them: {keys}. {none}")
    into = root.with_name(f"{root.name}_splits")
    links = ""
    if above.parent == root and all((each / split.name).is_dir() for each in folders for split in pair):
        links = " (as links: " + " && ".join(
            f"mkdir -p {_quoted(into / new)} && for c in {_quoted(root)}/*/; do "
            f'ln -s "$c"{_quoted(split.name)} {_quoted(into / new)}/"$(basename "$c")"; done'
            for new, split in zip(("train", "val"), pair, strict=True)
        ) + ")"  # fmt: skip
    return DataError(
        f"{says} Splits are read above the classes: put the class folders into train and val of a new folder"
        f"{links}, and name that: {_quoted(f'data.path={into}')}. {none}"
    )


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def _doubt(folders: Sequence[Path], option: str) -> DataError:
    names = ", ".join(shown(os.path.join(folder.parent.name, folder.name)) for folder in folders[:6])
    only = len(folders) == 1
    these = "this looks like a split, not a class" if only else "these look like splits, not classes"
    to_train_on = [each for each in folders if split_kind(each.name) != "held-out"]
    train = next((each for each in to_train_on if "train" in each.name.lower()), (*to_train_on, None)[0])
    held_out = next((each for each in folders if each != train and "train" not in each.name.lower()), None)
    keys = [
        shlex.quote(f"data.path={train}") if train else "data.path=FOLDER to train on",
        *([shlex.quote(f"data.eval_path={held_out}")] if held_out else []),
    ]
    return DataError(
        f"{option}={shown(folders[0].parent)} holds {names}: {these}, and which one to train on is not certain. "
        f"Name the folder{'s' if held_out else ''}: {' '.join(keys)}, or call them train and val. If these are "
        "classes of yours, write data.splits=none."
    )
