"""What was read is said, kept and compared: reports of data sources, and hashes of their contents."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import torch
from PIL import Image

from gatrain.data import ImageFolderData, PaddedText, TextWindows, fingerprint
from gatrain.data.compare import data_differences, same_print
from gatrain.data.fingerprint import content_fingerprint
from gatrain.data.report import DataRecord, DataReport, Omission
from gatrain.errors import ConfigError, DataError
from gatrain.report.data_lines import data_lines, whole_data_lines
from gatrain.tasks import Supervised
from gatrain.train.data_look import compare_classes, look_at_data
from gatrain.train.sample_prints import take_print


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def corpus(root: Path) -> Path:
    for name, text in {"a/1.txt": b"one", "a/2.txt": b"two", "b/1.txt": b"three" * 100}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root


# --- fingerprints of files ------------------------------------------------------------------------------


def test_a_copy_elsewhere_has_the_same_fingerprint_and_any_change_of_content_or_name_another(
    tmp_path: Path,
) -> None:
    root = corpus(tmp_path / "here")
    before = content_fingerprint(files_of(root), root)
    moved = Path(shutil.copytree(root, tmp_path / "far" / "away"))
    assert content_fingerprint(files_of(moved), moved) == before
    (moved / "a" / "2.txt").write_bytes(b"twO")
    changed = content_fingerprint(files_of(moved), moved)
    (root / "a" / "2.txt").rename(root / "a" / "3.txt")
    renamed = content_fingerprint(files_of(root), root)
    assert len({before, changed, renamed}) == 3


def test_the_name_of_a_single_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(b"123")
    (tmp_path / "copy.bin").write_bytes(b"123")
    assert content_fingerprint([tmp_path / "t.bin"]) == content_fingerprint([tmp_path / "copy.bin"])
    (tmp_path / "copy.bin").write_bytes(b"124")
    assert content_fingerprint([tmp_path / "t.bin"]) != content_fingerprint([tmp_path / "copy.bin"])


def test_of_data_beyond_the_limit_every_file_counts_with_blocks_spread_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 4096)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 256)
    monkeypatch.setattr(fingerprint, "MIN_BLOCK_BYTES", 64)
    paths = [tmp_path / f"{nth}.bin" for nth in range(3)]
    for path in paths:
        path.write_bytes(bytes(8192))
    before = content_fingerprint(paths)
    for nth, place in (
        (0, 0),
        (1, 8191),
        (2, 4100),
    ):  # the first block, the last one, another content altogether
        content = bytearray(8192)
        content[place : place + 600] = b"x" * len(content[place : place + 600])
        paths[nth].write_bytes(content[:8192] if nth < 2 else os.urandom(8192))
        assert content_fingerprint(paths) != before, nth
        paths[nth].write_bytes(bytes(8192))
    assert content_fingerprint(paths) == before


def test_hashes_are_kept_until_size_time_or_inode_of_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "KEPT_BYTES", 1)
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(10**12))
    root = corpus(tmp_path / "data")
    hashed: list[str] = []
    real = fingerprint._hash_file
    monkeypatch.setattr(
        fingerprint,
        "_hash_file",
        lambda path, *more: hashed.append(os.path.basename(path)) or real(path, *more),
    )
    before = content_fingerprint(files_of(root), root)
    assert sorted(hashed) == ["1.txt", "1.txt", "2.txt"]
    assert content_fingerprint(files_of(root), root) == before
    assert len(hashed) == 3
    times = (root / "a" / "2.txt").stat()
    (root / "a" / "new").write_bytes(b"TWO")  # same size, and made to bear the same time
    (root / "a" / "new").replace(root / "a" / "2.txt")
    os.utime(root / "a" / "2.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_fingerprint(files_of(root), root) != before
    assert hashed[3:] == ["2.txt"]
    for path in (tmp_path / "cache" / "fingerprints").iterdir():
        path.write_text('{"1.txt": 3, "2.txt": [[1], 2]}')
    assert content_fingerprint(files_of(root), root) != before


def test_a_file_that_was_just_written_is_hashed_again_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "KEPT_BYTES", 1)
    (tmp_path / "t.bin").write_bytes(b"123")
    content_fingerprint([tmp_path / "t.bin"])
    assert not (tmp_path / "cache").exists()
    old = time.time() - 100
    os.utime(tmp_path / "t.bin", (old, old))  # the time of the change of state stays


def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*t\.bin"):
        content_fingerprint([tmp_path / "t.bin"])


# --- eight kinds of sources, each with something left out, cut or broken ---------------------------------

PHRASE = "the cat sat on a mat while rain fell over grey hills. "
SMALL = {"vocab_size": 300, "context": 16}


def text_folder(root: Path) -> Any:
    (root / "a.txt").write_text(PHRASE * 20)
    (root / "b.txt").write_text("\ufeff" + PHRASE * 20)
    for name in (".hidden.txt", "._a.txt", "plot.png"):
        (root / name).write_text("x")
    (root / "again.txt").symlink_to(root / "a.txt")
    return TextWindows(str(root), **SMALL)


def json_lines(root: Path) -> Any:
    records = [{"text": PHRASE * 20}, {"text": ""}, {"text": PHRASE * 20}]
    (root / "r.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    return TextWindows(str(root / "r.jsonl"), **SMALL)


def table(root: Path) -> Any:
    (root / "r.csv").write_text(f"id,text\n1,{PHRASE * 20}\n2,\n3,{PHRASE * 20}\n")
    return TextWindows(str(root / "r.csv"), **SMALL)


def tokens(root: Path) -> Any:
    (np.arange(1003) % 300).astype("uint16").tofile(root / "t.bin")
    return TextWindows(str(root / "t.bin"), **SMALL)


def pairs(root: Path) -> Any:
    lines = [{"prompt": PHRASE * 20 if n % 3 == 0 else "hi", "completion": " ok then"} for n in range(30)]
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return PaddedText(str(root / "p.jsonl"), vocab_size=300, context=32)


def images(root: Path) -> Any:
    pixels = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for nth in range(6):
            Image.fromarray(pixels.integers(0, 255, (24, 24, 3)).astype("uint8")).save(
                root / name / f"{nth}.png"
            )
    for nth in range(6):
        (root / "dog" / f"{nth}.png").write_bytes((root / "dog" / f"{nth}.png").read_bytes()[:300])
    (root / ".ipynb_checkpoints").mkdir()
    (root / "dog" / "notes.txt").write_text("x")
    return ImageFolderData(str(root), size=16, eval_fraction=0.0)


class Own:
    """A user's own data set."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 15

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self.broken:
            raise OSError(f"scan_{index}.dcm is truncated")
        return torch.full((2, 3), float(index)), index % 3


class Reporting(Own):
    report = DataReport(
        kind="scans", files=15, size_bytes=3 * 2**20, items=15, item_name="scans", classes={"a": 5, "b": 5, "c": 5},
        omissions=[Omission("patients without consent left out", 4, ("p7", "p9"), of=19)],
    )  # fmt: skip


KINDS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "text files": (
        text_folder,
        [
            "2 files", "utf-8", "hidden files left out: ._a.txt", "again.txt = a.txt", "plot.png|files called .png",
            "1 byte-order marks dropped: ",
        ],
    ),
    "JSON Lines": (json_lines, ["2 documents", "1 empty documents: ", "r.jsonl, line 3", "2 blank lines left out"]),
    "CSV": (table, ["2 documents", "1 empty documents: ", "r.csv, line 3"]),
    "token files": (tokens, ["1,003 tokens", "9 of 1,003 (0.9%) tokens at the end, too few"]),
    "pairs": (pairs, ["30 pairs", "warning: 10 of 30 (33.3%) prompts cut to data.context"]),
    "images in class folders": (
        images,
        [
            "12 images in 2 classes: cat 6, dog 6", "by the ending .txt: dog/notes.txt",
            "hidden folders left out", "could not be read",
        ],
    ),
    "own data without a report": (
        lambda root: Own(broken=(0, 14)),
        [
            "test_data_report.Own", "float32 [2, 3], int",
            "warning: 2 of 8 (25.0%) tried samples could not be read", "sample 0: OSError: scan_0.dcm is truncated",
        ],
    ),
    "own data with a report": (
        lambda root: Reporting(),
        [
            "scans: 15 files, 3 MiB", "15 scans in 3 classes: a 5, b 5",
            "warning: 4 of 19 (21.1%) patients without consent left out: p7, p9, ...",
        ],
    ),
}  # fmt: skip


def look(source: Any) -> DataRecord:
    return look_at_data(Supervised(lambda: torch.nn.Linear(1, 1), source), source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_and_left_out_is_told_in_three_lines_and_one_for_each_kind_of_omission(
    kind: str, tmp_path: Path
) -> None:
    make, told = KINDS[kind]
    record = look(make(tmp_path))
    lines = data_lines(record)
    assert len(lines) == 3 + len(record.omissions()) > 3
    assert max(map(len, lines)) <= 80
    assert f"{record.train_samples} samples to train on, {record.eval_samples} held out; " in lines[2]
    text = "\n".join([*lines, *whole_data_lines(record)])
    for words in told:
        assert any(each in text for each in words.split("|")), (words, text)
    assert [line for line in lines if "warning: " in line] or not record.warnings()
    stored = json.loads(json.dumps(record.to_dict()))
    assert json.loads(json.dumps(DataRecord.from_dict(stored).to_dict())) == stored
    assert not data_differences(record, look(make_again(make, tmp_path)))


def make_again(make: Callable[[Path], Any], root: Path) -> Any:
    """The same, made a second time in the same place."""
    for path in list(root.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return make(root)


# --- prints of samples ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    name: str
    box: tuple[float, ...]


SAMPLE: dict[str, Any] = {
    "image": torch.linspace(0, 1, 300).reshape(3, 10, 10), "ids": np.arange(9), "text": "señor", "label": 3,
    "picture": Image.new("L", (4, 4), 7), "case": Case("a", (0.1, 0.2)), "list": [1, None, True, b"x"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("image", torch.linspace(0, 1.01, 300).reshape(3, 10, 10)),
        ("image", torch.linspace(0, 1, 300).reshape(10, 3, 10)),
        ("image", torch.linspace(0, 1, 300, dtype=torch.float64).reshape(3, 10, 10)), ("ids", np.arange(9) + 1),
        ("text", "senor"), ("label", 4), ("label", True), ("label", "3"), ("picture", Image.new("L", (4, 4), 8)),
        ("case", Case("b", (0.1, 0.2))), ("case", Case("a", (0.1, 0.3))), ("list", [1, None, True]),
        ("image", torch.linspace(0, 1, 300).reshape(3, 10, 10).flip(2)),
        ("image", torch.full((3, 10, 10), float("nan"))),
    ],
)  # fmt: skip
def test_prints_tell_samples_apart(key: str, other: Any) -> None:
    left_out: set[str] = set()
    one, two = take_print(SAMPLE, left_out), take_print(SAMPLE | {key: other}, left_out)
    assert same_print(one, json.loads(json.dumps(take_print(SAMPLE, left_out))))
    assert not same_print(one, two)
    assert not left_out


def test_prints_do_not_tell_the_last_bits_of_floating_numbers() -> None:
    image = SAMPLE["image"]
    rounded = image * (1 + 1e-6 * torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)))
    assert same_print(take_print(image, set()), take_print(rounded, set()))


def test_what_cannot_be_compared_is_said_and_not_compared() -> None:
    class Odd(Own):
        def __getitem__(self, index: int) -> Any:
            return object(), index

    class Restless(Own):
        def __getitem__(self, index: int) -> Any:
            return time.perf_counter_ns()

    assert look(Odd()).not_compared == "builtins.object in its samples cannot be compared"
    restless = look(Restless())
    assert restless.not_compared == "its samples differ each time they are read"
    assert not data_differences(restless, look(Restless()))


def test_each_sample_is_read_with_its_own_seed() -> None:
    class Random(Own):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(2)

    one, two = look(Random()), look(Random())
    assert not data_differences(one, two)
    assert len({json.dumps(each) for each in one.samples.values()}) == len(one.samples) == 8


def test_held_out_samples_and_another_way_of_reading_the_same_files_count_too() -> None:
    class Split:
        def __init__(self, held_out: float, scale: float = 1.0) -> None:
            self.train = torch.utils.data.TensorDataset(torch.arange(9.0) * scale)
            self.eval = torch.utils.data.TensorDataset(torch.full((4,), held_out))

        report = DataReport(kind="numbers", items=13, fingerprint="of the files")

    one = look(Split(1.0))
    assert not data_differences(one, look(Split(1.0)))
    ((key, old, _),) = data_differences(one, look(Split(2.0)))
    assert key == "data.contents"
    assert old.startswith("held-out sample 0 and 1 more of 10 with the hash ")
    ((key, old, _),) = data_differences(one, look(Split(1.0, scale=2.0)))
    assert (key, old[:9]) == ("data.contents", "sample 1 ")


# --- classes and models ---------------------------------------------------------------------------------


def test_classes_are_compared_with_those_of_the_model() -> None:
    report = Reporting.report
    assert compare_classes(report, {"classes": 3}) == []
    assert compare_classes(report, {"width": 2}) == []
    (remark,) = compare_classes(report, {"num_classes": 1000})
    assert "model.num_classes=1000, but the data has only 3 classes (a, b, c)" in remark
    with pytest.raises(ConfigError, match=r"model.classes=2, but the data has 3 classes: a, b, c"):
        compare_classes(report, {"classes": 2})


# --- show --data ----------------------------------------------------------------------------------------

SHOWN = """
import torch
class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, index):
        if index in (3, 17):
            raise OSError(f"scan_{index} is truncated")
        return torch.zeros(2), index % 2
"""


SHOWN_RECIPE = """
defaults: [base, _self_]
data: {_target_: mine.Points}
model: {_target_: torch.nn.Linear, in_features: 2, out_features: 2}
task: {_target_: gatrain.tasks.Supervised}
train: {steps: 1}
batch: {effective: 99}
"""


def test_show_data_reads_without_training_and_check_finds_every_broken_sample(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SHOWN)
    (tmp_path / "mine.yaml").write_text(SHOWN_RECIPE)
    done = command.run("show", "--data", "--check", "recipe=./mine.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert (found["checked"], found["train_samples"]) == (20, 20)
    assert found["broken"] == [f"sample {n}: OSError: scan_{n} is truncated" for n in (3, 17)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "mine.py",
        "mine.yaml",
    ]
