"""Which files a path names: every file once, in an order of names, and nothing left out without a count."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from pathlib import Path

import pytest

from gatrain.data import folders
from gatrain.data.folders import find, require_path, shown, walk
from gatrain.data.report import Omissions
from gatrain.data.splits import Splits, looks_like_split, splits
from gatrain.errors import ConfigError, DataError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def walked(root: Path) -> tuple[list[str], dict[str, int]]:
    omissions = Omissions()
    found = [file.relative_to(root).as_posix() for file in walk(root, omissions)]
    return found, {each.what: each.count for each in omissions.found()}


def test_the_order_is_that_of_the_names_part_by_part_and_not_of_the_disk(tmp_path: Path) -> None:
    names = ["a/z.txt", "a/b/c.txt", "a.txt", "B.txt", "a-b.txt", "é.txt", "e\u0301a.txt", "10.txt", "9.txt"]
    shuffled = random.Random(3).sample(names, len(names))
    found, left_out = walked(make(tmp_path, *shuffled))
    assert found == [
        "10.txt",
        "9.txt",
        "B.txt",
        "a/b/c.txt",
        "a/z.txt",
        "a-b.txt",
        "a.txt",
        "é.txt",
        "e\u0301a.txt",
    ]
    assert left_out == {}


def test_hidden_files_and_those_of_systems_are_left_out_and_counted(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a/1.txt",
        "a/._1.txt",
        ".DS_Store",
        ".ipynb_checkpoints/1.txt",
        "__MACOSX/a/1.txt",
        "a/Thumbs.db",
    )
    make(tmp_path, "a/.git/config", "lost+found/1")
    found, left_out = walked(tmp_path)
    assert found == ["a/1.txt"]
    assert left_out == {
        folders.HIDDEN_FILES: 2,
        folders.HIDDEN_FOLDERS: 2,
        folders.SYSTEM_FOLDERS: 2,
        folders.SYSTEM_FILES: 1,
    }


def test_links_are_followed_once_and_doubles_are_counted(tmp_path: Path) -> None:
    root, store = tmp_path / "root", make(tmp_path / "store", "1.txt", "deep/2.txt")
    make(root, "dog/0.txt", "zebra/9.txt")
    (store / "back").symlink_to(root)  # a cycle through a folder elsewhere
    (root / "dog" / "up").symlink_to("../../root")
    (root / "a_first").symlink_to("zebra")  # the real folder counts, though the link sorts first
    (root / "shard").symlink_to(store)
    (root / "shard2").symlink_to(store)
    (root / "top").symlink_to(tmp_path)
    (root / "self").symlink_to("self")
    (root / "gone").symlink_to("nowhere")
    (root / "alias.txt").symlink_to("dog/0.txt")
    os.link(root / "zebra" / "9.txt", root / "zebra" / "9_hard.txt")
    found, left_out = walked(root)
    assert found == ["dog/0.txt", "shard/1.txt", "shard/deep/2.txt", "zebra/9.txt"]
    assert left_out == {
        folders.FOLDER_TWICE: 2,
        folders.ABOVE: 3,
        folders.NOWHERE: 2,
        folders.FILE_TWICE: 2,
        folders.OUTSIDE: 2,
    }


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path) -> None:
    make(tmp_path, "1.txt")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as one:
        before = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket may not be long
        try:
            one.bind("sock")
        finally:
            os.chdir(before)
        found, left_out = walked(tmp_path)
    assert found == ["1.txt"]
    assert left_out == {folders.SPECIAL: 3}
    for name in ("fifo", "null"):
        with pytest.raises(DataError, match="pipe, socket or device"):
            find(str(tmp_path / name), Omissions())


def test_a_pattern_gives_the_files_that_the_folder_gives(tmp_path: Path) -> None:
    root, store = tmp_path / "root", make(tmp_path / "store", "s.jsonl", "s.txt")
    make(root, "a.jsonl", "b/c.jsonl", "b/._c.jsonl", ".hidden/d.jsonl", "b/e.txt", "data[1]/f.jsonl")
    (root / "shard").symlink_to(store)
    (root / "b" / "up").symlink_to(root)
    every = walk(root, Omissions())
    for pattern in ("**", "**/*", "**/**/*"):
        assert find(f"{root}/{pattern}", Omissions()) == every
    omissions = Omissions()
    only = find(f"{root}/**/*.jsonl", omissions)
    assert only == [file for file in every if file.suffix == ".jsonl"]
    assert {each.what for each in omissions.found()} == {
        folders.HIDDEN_FILES,
        folders.HIDDEN_FOLDERS,
        folders.ABOVE,
        folders.OUTSIDE,
    }
    assert find(f"{root}/*/*.txt", Omissions()) == [root / "b/e.txt", root / "shard/s.txt"]
    assert find(f"{root}/.hidden/*.jsonl", Omissions()) == [root / ".hidden/d.jsonl"]
    assert find(f"{root}/.h*/*.jsonl", Omissions()) == [root / ".hidden/d.jsonl"]
    assert find(f"{root}/data[1]/*.jsonl", Omissions()) == [root / "data[1]/f.jsonl"]
    assert find(f"{root}/b/[c-e].*", Omissions()) == [root / "b/c.jsonl", root / "b/e.txt"]
    with pytest.raises(DataError, match=r"matches no file below .*root"):
        find(f"{root}/*.parquet", Omissions())


def test_a_pattern_goes_only_where_it_can_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.txt", "b/deep/er/2.txt", "a/sub/3.txt")
    seen = []
    real = folders._listing
    monkeypatch.setattr(folders, "_listing", lambda folder: seen.append(folder.name) or real(folder))
    assert find(f"{tmp_path}/a*/*.txt", Omissions()) == [tmp_path / "a/1.txt"]
    assert set(seen) == {tmp_path.name, "a"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is not set"),
        ("", "is empty"),
        ("  ", "is empty"),
        (True, "is a bool"),
        (["a"], "is a list"),
        ("a\0b", "null character"),
        ("$CORPUS", r"\$CORPUS, which nothing has replaced"),
        ("${HOME_OF_DATA}/x", "which nothing has replaced"),
        ("data/$SPLIT/*.txt", "which nothing has replaced"),
        ("~nosuchuser/x", "no such user"),
        ("/", "the whole file system"),
        ("//", "the whole file system"),
        ("/**/*.txt", "whole file system"),
        ("/*", "whole file system"),
    ],
)
def test_a_path_that_is_empty_or_unset_is_refused_with_what_to_write(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        require_path(value)
    assert "data.path" in str(caught.value)


def test_a_path_that_exists_is_taken_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(make(tmp_path / "home", "x.txt")))
    make(tmp_path, "$5.txt", "~tilde/1.txt", "a=b/é.txt", "[1]*.txt")
    for name in ("$5.txt", "~tilde", "a=b", "[1]*.txt", "."):
        assert str(require_path(name)) == name
    assert require_path("~/x.txt") == tmp_path / "home/x.txt"
    assert find("[1]*.txt", Omissions()) == [tmp_path / "[1]*.txt"]


def test_what_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    make(tmp_path, "corpus/1.txt")
    with pytest.raises(DataError, match=r"does not exist\. Did you mean 'corpus'"):
        find(str(tmp_path / "corpsu"), Omissions())
    with pytest.raises(DataError, match="There is no folder"):
        find(str(tmp_path / "no" / "corpus"), Omissions())
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(DataError, match="points nowhere"):
        find(str(tmp_path / "link"), Omissions())
    make(tmp_path, "only/.hidden")
    with pytest.raises(DataError, match=r"no files in it \(1 hidden files left out"):
        find(str(tmp_path / "only"), Omissions())


def test_names_are_printed_without_what_a_terminal_would_obey() -> None:
    assert shown("a\x1b[2Jb\n\udcff é.txt") == r"a\x1b[2Jb\n\udcff é.txt"


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.txt", "shut/2.txt")
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*shut: Permission denied"):
        walk(tmp_path, Omissions())


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train", "val"], "train", "val"),
        (["Train", "Valid"], "Train", "Valid"),
        (["TRAIN", "TEST"], "TRAIN", "TEST"),
        (["training", "validation"], "training", "validation"),
        (["train", "dev", "test"], "train", "dev"),
        (["train", "eval"], "train", "eval"),
        (["train", "test", "val", "annotations"], "train", "val"),
        (["train/cat"], "train", None),
        (["images/train", "images/val", "labels/train"], "images/train", "images/val"),
        (["cats_and_dogs/train", "cats_and_dogs/test"], "cats_and_dogs/train", "cats_and_dogs/test"),
    ],
)
def test_splits_are_recognised(tmp_path: Path, names: list[str], train: str, held_out: str | None) -> None:
    make(tmp_path, *(f"{name}/x/1.txt" for name in names))
    expected = Splits(tmp_path / train, tmp_path / held_out if held_out else None)
    assert splits(tmp_path, Omissions()) == expected


def test_what_lies_beside_the_splits_is_counted(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}/x/1.txt" for name in ("train", "val", "test", "meta")))
    omissions = Omissions()
    splits(tmp_path, omissions)
    (found,) = omissions.found()
    assert (found.count, found.examples) == (2, ("meta", "test"))


@pytest.mark.parametrize(
    "names",
    [
        ["val", "test"],
        ["test", "control"],
        ["train1", "val1"],
        ["training_set", "test_set"],
        ["seg_train", "seg_test"],
        ["trainset", "cats"],
        ["train2017", "val2017"],
        ["cats_train", "cats_test"],
        ["train", "Training", "val"],
        ["train", "val", "Val"],
        ["fold1", "fold2"],
        ["images/val", "images/test"],
        ["cat/train", "cat/test", "dog/train", "dog/test"],
        ["cat/train_set", "cat/test_set", "dog/train_set", "dog/test_set"],
        ["cat/cat_train", "cat/cat_val", "dog/dog_train", "dog/dog_val"],
        ["a/v1/train", "a/v1/val", "b/v1/train", "b/v1/val"],
        ["data/v1/train", "data/v1/val"],
    ],
)
def test_what_may_be_splits_is_refused_and_never_taken_as_classes(tmp_path: Path, names: list[str]) -> None:
    make(tmp_path, *(f"{name}/x/1.txt" for name in names))
    with pytest.raises(
        DataError, match=r"looks? like (a split|splits), not (a )?class.*data\.path=.*data\.splits=none"
    ):
        splits(tmp_path, Omissions())


def test_the_links_that_are_told_for_splits_within_classes_make_splits(tmp_path: Path) -> None:
    root = tmp_path / "the data"
    made = [f"{kind}/{split}" for kind in ("cat", "dog x") for split in ("train_set", "test_set")]
    make(root, *(f"{name}/1.txt" for name in made))
    with pytest.raises(DataError, match="as links") as refused:
        splits(root, Omissions())
    command = str(refused.value).split("as links: ")[1].split("), and name that")[0]
    subprocess.run(["bash", "-c", command], check=True)
    into = tmp_path / "the data_splits"
    assert splits(into, Omissions()) == Splits(into / "train", into / "val")
    read = {file.relative_to(into).as_posix(): file.read_text() for file in walk(into, Omissions())}
    assert read == {
        f"{new}/{kind}/1.txt": f"{kind}/{old}/1.txt"
        for kind in ("cat", "dog x")
        for new, old in (("train", "train_set"), ("val", "test_set"))
    }


def test_a_lone_folder_called_train_beside_classes_may_be_the_vehicle(tmp_path: Path) -> None:
    make(tmp_path, "train/1.txt", "bus/1.txt", "car/1.txt")
    with pytest.raises(DataError, match="this looks like a split"):
        splits(tmp_path, Omissions())


@pytest.mark.parametrize(
    "name", ["bullet train", "test_tube", "cat", "images", "training_shoes", "valley", "set1"]
)
def test_classes_that_only_sound_like_splits_are_classes(tmp_path: Path, name: str) -> None:
    assert not looks_like_split(name)
    make(tmp_path, f"{name}/1.txt", "other/1.txt")
    assert splits(tmp_path, Omissions()) is None


def test_nobody_is_told_to_train_on_what_is_held_out(tmp_path: Path) -> None:
    make(tmp_path, "trian/x/1.txt", "val/x/1.txt")
    with pytest.raises(DataError, match=r"data\.path=FOLDER to train on data\.eval_path=\S+/val,"):
        splits(tmp_path, Omissions())
