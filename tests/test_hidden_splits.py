"""Text splits that lie deeper or have longer names are refused, never read as one text."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gatrain.data.text_files import find_files
from gatrain.errors import DataError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["en/train/0.parquet", "en/validation/0.parquet", "de/train/0.parquet", "de/validation/0.parquet",
          "en/test/0.parquet"], ["de/train/0.parquet", "en/train/0.parquet"],
         ["de/validation/0.parquet", "en/validation/0.parquet"]),
        (["default/partial-train/0.parquet", "default/test/0.parquet"],
         ["default/partial-train/0.parquet"], ["default/test/0.parquet"]),
        (["data/train/a.txt", "data/val/a.txt"], ["data/train/a.txt"], ["data/val/a.txt"]),
        (["train_set/a.txt", "test_set/a.txt"], ["train_set/a.txt"], ["test_set/a.txt"]),
        (["train1/a.txt", "train2/a.txt", "test1/a.txt"], ["train1/a.txt", "train2/a.txt"], ["test1/a.txt"]),
        (["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw", "README.md"],
         ["wiki.train.raw"], ["wiki.valid.raw"]),
        (["trainData1.jsonl", "TrainData2.jsonl", "testData1.jsonl"],
         ["TrainData2.jsonl", "trainData1.jsonl"], ["testData1.jsonl"]),
    ],
)  # fmt: skip
def test_hidden_splits_are_refused_and_what_is_said_names_them(
    tmp_path: Path, names: list[str], train: list[str], held_out: list[str]
) -> None:
    make(tmp_path, *names)
    with pytest.raises(DataError, match="look like splits") as refused:
        find_files(tmp_path)
    given = shlex.split(str(refused.value).split("Name them: ")[1].split(" (patterns")[0])
    typed = dict(word.split("=", 1) for word in given)
    found = find_files(typed["data.path"], typed["data.eval_path"])
    assert [file.relative_to(tmp_path).as_posix() for file in found.train] == train
    assert [file.relative_to(tmp_path).as_posix() for file in found.held_out] == held_out
    assert len(find_files(f"{tmp_path}/**").train) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ["src/train/a.py", "src/test/b.py"],
        ["docs/training/a.md", "docs/testing/b.md"],
        ["docs/training.md", "docs/evaluation.md"],
        ["setup.py", "requirements-train.txt", "requirements-test.txt"],
        ["bullet train/a.txt", "crash test/a.txt"],
        ["en/train/a.txt", "de/test.md"],
    ],
)
def test_source_code_and_other_names_are_read_as_they_were(tmp_path: Path, names: list[str]) -> None:
    assert len(find_files(make(tmp_path, *names)).train) == len(names)
