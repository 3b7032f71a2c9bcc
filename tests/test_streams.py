"""Streams: windows of data that is only read in order, for any number of ranks, and going on in them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import enum
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from gatrain import build
from gatrain.config import EvalConfig, RunConfig, TrainConfig
from gatrain.data import Mixture
from gatrain.errors import BrokenSampleError, ConfigError, DataError
from gatrain.tasks import Supervised
from gatrain.tasks.parts import map_style
from gatrain.tasks.streams import Stream, StreamReader, fingerprint
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.ranks import Ranks
from gatrain.train.stream_loader import StreamWindows, ranks_read_the_same
from gatrain.train.window_source import open_windows

SAMPLES = 22


class Numbers(IterableDataset[Any]):
    """22 samples in order, augmented with numbers of all three generators."""

    def __iter__(self) -> Iterator[Any]:
        return map(augmented, range(SAMPLES))


def augmented(number: int) -> Any:
    drawn = torch.rand(1) / 8 + random.random() / 8 + np.random.rand() / 8
    return torch.full((4,), float(number)) + drawn, torch.tensor([float(number)])


class Counted(Numbers):
    """Knows its place."""

    def __init__(self) -> None:
        self.place = 0
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        for place in range(self.start, SAMPLES):
            self.place = place
            yield augmented(place)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"] + 1


class Off(Counted):
    """Goes on at another sample than the next."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"] + 2


def net() -> nn.Module:
    return nn.Linear(4, 1)


def loaded(data: Any, effective: int = 5, **given: Any) -> list[LoadedWindow]:
    task = Supervised(net, data, nn.MSELoss())
    schedule = StreamWindows(2**40, effective, 7, given.pop("drop_last", False), first=20)
    ranks = Ranks(given.pop("rank", 0), given.pop("ranks", 1))
    kept = {"micro_batch": 2, "shares": None, "start": 0, "stop": 11, "position": None}
    return list(open_windows(task, schedule, ranks, **(kept | given)))


def inputs(windows: list[LoadedWindow]) -> list[list[float]]:
    return [[float(x) for micro in each.micro_batches for x in micro.batch[0][:, 0]] for each in windows]


def numbers(windows: list[LoadedWindow]) -> list[list[int]]:
    return [[int(x) for x in each] for each in inputs(windows)]


def test_every_world_size_sees_the_same_windows_down_to_the_augmentation() -> None:
    alone = loaded(Numbers())
    assert numbers(alone)[:5] == [list(range(n, min(n + 5, 22))) for n in range(0, 22, 5)]
    assert [each.epoch for each in alone] == [0] * 5 + [1] * 5 + [2]
    assert inputs(alone)[0] != inputs(alone)[5]  # augmented anew in each epoch
    for ranks in (2, 3, 7):
        parts = [loaded(Numbers(), rank=rank, ranks=ranks, micro_batch=1) for rank in range(ranks)]
        joined = [[x for part in each for x in part] for each in zip(*map(inputs, parts), strict=True)]
        assert joined == inputs(alone)
        for each in zip(alone, *parts, strict=True):
            assert sum(part.counts["digest"] for part in each[1:]) == each[0].window_digest
    dropping = loaded(Numbers(), drop_last=True, stop=5)
    assert numbers(dropping) == [*numbers(alone)[:4], [0, 1, 2, 3, 4]]
    assert inputs(dropping)[4] == inputs(alone)[5]


class WithLength(Numbers):
    """As many write it, for bars of progress and for a DataLoader."""

    def __len__(self) -> int:
        return SAMPLES


def test_a_stream_that_tells_its_length_is_a_stream_all_the_same() -> None:
    data = map_style(WithLength(), "data")
    assert isinstance(data, Stream)
    assert len(data) == SAMPLES
    with pytest.raises(ConfigError, match="part 0 of the mixture is a WithLength"):
        Mixture([WithLength()])


def test_a_loader_process_reads_what_the_rank_itself_reads() -> None:
    assert inputs(loaded(Numbers(), workers=2, stop=7)) == inputs(loaded(Numbers(), stop=7))


@pytest.mark.parametrize("kind", [Numbers, Counted, Off])
def test_a_run_goes_on_bit_for_bit_at_any_window_by_state_or_by_counting(kind: Any) -> None:
    whole = loaded(kind())
    for step in (1, 4, 5, 7):
        position = json.loads(json.dumps(whole[step - 1].position))
        rest = loaded(kind(), start=step, position=position)
        assert inputs(rest) == inputs(whole[step:])
        said = " ".join(rest[0].notices)
        assert (f"by reading past {(step // 5) * 22 + step % 5 * 5} samples" in said) == (
            kind is not Counted or step == 1
        )
        assert ("state" in position) == (kind is Counted and step > 1)


def test_a_state_that_turns_out_wrong_is_not_gone_on_from() -> None:
    whole = loaded(Counted())
    position = whole[6].position
    assert position is not None
    for wrong in ({"place": 2}, {"place": "x"}, {"place": 21}):
        rest = loaded(Counted(), start=7, position=position | {"state": wrong})
        assert inputs(rest) == inputs(whole[7:])
        assert "by reading past 32 samples" in rest[0].notices[0]
    with pytest.raises(
        DataError, match="sample 9 of epoch 2 of data is not the one that the run had read there"
    ):
        loaded(Numbers(), start=7, position={"epoch": 1, "place": 10, "last": 1})


def test_hugging_face_streams_go_on_bit_for_bit_with_a_shuffle_buffer_too() -> None:
    table = datasets.Dataset.from_dict(
        {"x": [[float(n)] * 4 for n in range(SAMPLES)], "y": [[0.0]] * SAMPLES}
    )
    plain = table.to_iterable_dataset(num_shards=2).with_format("torch")
    shuffled = plain.shuffle(seed=3, buffer_size=8)
    for stream in (plain, shuffled):
        stream.collate = lambda samples: (  # type: ignore[attr-defined]
            torch.stack([s["x"] for s in samples]),
            torch.stack([s["y"] for s in samples]),
        )
        whole = loaded(stream, stop=8)
        assert sorted(x for each in numbers(whole)[:5] for x in each) == list(range(SAMPLES))
        for step in range(1, 8):
            position = whole[step - 1].position
            rest = loaded(stream, start=step, stop=8, position=position)
            assert inputs(rest) == inputs(whole[step:])
            assert position is not None
            assert stream is shuffled or step == 1 or "state" in position
    assert numbers(whole)[0] != numbers(whole)[5]  # set_epoch shuffles anew


def test_what_splits_a_stream_by_rank_is_seen_in_the_first_window() -> None:
    same = {"print": 3 * 77.0, "print_squared": 3 * 77.0**2}
    assert ranks_read_the_same(same, 3)
    assert not ranks_read_the_same({"print": 77.0 * 2 + 78, "print_squared": 2 * 77.0**2 + 78**2}, 3)
    one, other = (loaded(Numbers(), rank=rank, ranks=2)[0].counts["print"] for rank in (0, 1))
    assert one == other
    assert fingerprint([torch.ones(2), "a"]) != fingerprint([torch.ones(2), "b"])


class Backwards(Numbers):
    """Reads the other way round each time."""

    forward = True

    def __iter__(self) -> Iterator[Any]:
        self.forward = not self.forward
        found = list(super().__iter__())
        return iter(found if self.forward else found[::-1])


class Broken(Numbers):
    def __iter__(self) -> Iterator[Any]:
        yield from list(super().__iter__())[:3]
        raise BrokenSampleError("three.png cannot be decoded", skip=True)


class Skipping(Numbers):
    def __iter__(self) -> Any:
        return _Skipping()


class _Skipping:
    place = -1

    def __next__(self) -> Any:
        self.place += 1
        if self.place == 3:
            raise BrokenSampleError("three.png cannot be decoded", skip=True)
        if self.place == SAMPLES:
            raise StopIteration
        return torch.full((4,), float(self.place)), torch.zeros(1)


class Few(Numbers):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[:3])


def test_streams_that_cannot_be_exact_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"an iterator \(generator\), which can be read only once"):
        loaded(x for x in Numbers())
    with pytest.raises(DataError, match="begins with another sample when it is iterated again"):
        len(Stream(Backwards(), "data"))
    with pytest.raises(DataError, match="a generator ends with its first error"):
        loaded(Broken())
    with pytest.raises(DataError, match=r"ended after 3 samples, fewer than batch.effective=5"):
        loaded(Few())
    reader = StreamReader(Stream(Numbers(), "data"), 0)
    with pytest.raises(DataError, match="ended after 22 samples of epoch 1, but the run had read 30"):
        reader.go_to({"epoch": 0, "place": 30})
    (first, *_) = loaded(Skipping())
    assert (first.counts["samples"], first.counts["unreadable"]) == (4, 1)
    assert first.skipped == ["three.png cannot be decoded"]


class Splits:
    train = Numbers()
    eval = Numbers()


def task_of(train: TrainConfig, evaluation: EvalConfig, order: Any = "shuffle") -> Any:
    config = dataclasses.replace(
        RunConfig(),
        data={"_target_": "test_streams.Splits"},
        model={"_target_": "test_streams.net"},
        loss={"_target_": "torch.nn.MSELoss"},
        order=order,
        task={"_target_": "gatrain.tasks.Supervised"},
        train=train,
        eval=evaluation,
    )
    return config, build.build_task(config)


def test_what_a_stream_cannot_tell_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"Use for example train.steps=1000 train.epochs=null"):
        task_of(TrainConfig(epochs=2.0), EvalConfig(samples=4))
    with pytest.raises(ConfigError, match=r"for example eval.samples=1000"):
        task_of(TrainConfig(steps=2), EvalConfig())
    with pytest.raises(ConfigError, match="read in its own order"):
        task_of(TrainConfig(steps=2), EvalConfig(samples=4), {"name": "weighted", "weights": "w"})
    config, task = task_of(TrainConfig(steps=2), EvalConfig(samples=4))
    assert (len(task.train_data), len(task.eval_data)) == (SAMPLES, 4)
    schedule = build.window_schedule(config, task, 8)
    assert schedule.window(3).ids.tolist() == list(range(8))
    with pytest.raises(DataError, match=r"Use batch.effective=22 or less"):
        build.window_schedule(config, task)


MINE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        for number in range(23):
            yield torch.full((4,), float(number)) / 23 + torch.rand(4) / 8, torch.tensor([number / 23])

class Data:
    def __init__(self):
        self.train, self.eval = Numbers(), Numbers()
"""
RECIPE = """
defaults: [base, override optimizer: sgd, override schedule: constant, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Data}
loss: {_target_: torch.nn.MSELoss}
batch: {effective: 5, micro: 2}
train: {steps: 12, log_every: 1}
eval: {samples: 7, every: 6}
optimizer: {lr: 0.1}
device: cpu
"""


def run_cli(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gatrain", *words], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_stopped_run_on_a_stream_goes_on_to_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    run_cli(tmp_path, "fit", "recipe=mine", "run.dir=whole")
    run_cli(tmp_path, "fit", "recipe=mine", "run.dir=parts", "train.steps=7")
    done = run_cli(tmp_path, "resume", "parts", "train.steps=12")
    assert "went on in the stream by reading past 33 samples" in done  # 23 + 10
    weights = [
        tmp_path / name / "saved" / "step_00000012" / "model.safetensors" for name in ("whole", "parts")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    whole, parts = (lines(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]
    assert [line["window"] for line in whole] == [line["window"] for line in parts]
    found = lines(tmp_path / "whole", "evaluations.jsonl")
    assert found[-1] == lines(tmp_path / "parts", "evaluations.jsonl")[-1]


# --- samples that are objects -----------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    name: str


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Pair(torch.ones(2), "a"), Pair(torch.zeros(2), "a")),
        (Slotted([1]), Slotted([2])),
        (collections.UserDict(ids=[1]), collections.UserDict(ids=[2])),  # as a tokenizer gives them
        (Colour.RED, Colour.BLUE),
        ({1, 2}, {1, 3}),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        (np.array([1, "a"], dtype=object), np.array([2, "a"], dtype=object)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_are_told_apart_by_what_they_hold(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(copy.deepcopy(one)) != fingerprint(other)


class Forgetful(torch.utils.data.IterableDataset[Pair]):
    """Goes on with other samples than those that follow: its state loses what lies in its buffer of two."""

    def __init__(self) -> None:
        self.first = self.read = 0

    def __iter__(self) -> Iterator[Pair]:
        waiting: list[Pair] = []
        self.read = self.first
        while True:
            waiting.append(Pair(torch.full((2,), float(self.read)), "x"))
            self.read += 1
            if len(waiting) > 2:
                yield waiting.pop(0)

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["read"]


def test_a_state_that_loses_samples_is_not_believed_where_samples_are_objects() -> None:
    reader = StreamReader(Stream(Forgetful(), "data"), 0, saves=True)
    reader.take(4)
    reader.position()
    reader.take(4)
    position = reader.position()
    wanted = [float(each.x[0]) for each in reader.take(3)]
    again = StreamReader(Stream(Forgetful(), "data"), 0, saves=True)
    again.go_to(position)
    assert [float(each.x[0]) for each in again.take(3)] == wanted == [8.0, 9.0, 10.0]
