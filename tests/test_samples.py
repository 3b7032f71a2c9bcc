"""Reading and counting samples: seeds, the process's generators, batches of any form, what a thread may read."""

from __future__ import annotations

import os
import random
import threading
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import TensorDataset, default_collate

from gatrain.data import digits
from gatrain.errors import ConfigError, DataError, DoesNotFitError, ExactnessError, SavedStateError
from gatrain.tasks import Supervised
from gatrain.tasks.base import is_deterministic
from gatrain.tasks.losses import samples_in
from gatrain.tasks.parts import find_splits
from gatrain.train import loader, samples, seeding
from gatrain.train.batches import bytes_of, map_tensors, move_to
from gatrain.train.evaluate import evaluation_keys
from gatrain.train.loader import DRAWS_UNDECLARED, WindowLoader
from gatrain.train.loop import Trainer
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.ranks import Ranks
from gatrain.train.read_ahead import PREFETCH, FreeMemory, ReadAhead, bounded
from gatrain.train.saved_state import Progress, check_same_run
from gatrain.train.windows import WindowSchedule, windows
from gatrain.units import MIB


class Drawn:
    """Samples that draw from all three generators."""

    def __init__(self, count: int = 12, declared: bool = False) -> None:
        self.count = count
        self.threads: set[str] = set()
        if declared:
            self.deterministic = True

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        noise = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])
        return noise + index, noise[:1]


class Plain(Drawn):
    deterministic = True

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        return torch.full((3,), float(index)), torch.zeros(1)


class Source:
    def __init__(self, train: Any, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.train = train
        if collate is not None:
            self.collate = collate


def masking(listed: list[Any]) -> Any:
    x, y = default_collate(listed)
    return x * (torch.rand(x.shape) < 0.5) * random.random() * np.random.rand(), y


def task_of(data: Any, loss: Any = None, **options: Any) -> Supervised:
    return Supervised(lambda: nn.Linear(3, 1), data, loss or nn.MSELoss(), **options)


def loaded(
    task: Supervised, workers: int = 0, stop: int = 5, rank: int = 0, world: int = 1
) -> list[LoadedWindow]:
    schedule = WindowSchedule(len(task.train_data), 4, seed=7)
    ranks = Ranks(rank, world)
    return list(WindowLoader(task, schedule, ranks, micro_batch=2, start=0, stop=stop, workers=workers))


def batches(found: list[LoadedWindow]) -> list[Tensor]:
    return [tensor for window in found for micro in window.micro_batches for tensor in micro.batch]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# Seeds


def test_a_sample_follows_from_seed_epoch_and_number_alone() -> None:
    task = task_of(Drawn())
    together = samples.read(task, task.train_data, [(0, 3), (0, 5), (1, 3)], 7)
    (alone,) = samples.read(task, task.train_data, [(0, 5)], 7)
    assert torch.equal(together[1][0], alone[0])
    assert not torch.equal(together[0][0], together[2][0])
    assert not torch.equal(samples.read(task, task.train_data, [(0, 5)], 8)[0][0], alone[0])


@pytest.mark.parametrize("kept", [slice(-1), slice(0)])
def test_data_that_gives_fewer_samples_than_numbers_is_refused(kept: slice) -> None:
    class Short(TensorDataset):
        deterministic = True

        def __getitems__(self, ids: list[int]) -> list[Any]:
            return [self[number] for number in ids][kept]

    data = Short(torch.arange(9.0), torch.arange(9.0))
    task = Supervised(lambda: nn.Linear(1, 1), data, nn.MSELoss())
    with pytest.raises(DataError, match=r"Short.__getitems__ gives [02] samples for 3 numbers"):
        samples.load(task, data, [(0, 1), (0, 4), (0, 2)], 0)


def test_reading_and_collating_leave_the_generators_alone() -> None:
    task = task_of(Source(Drawn(), masking))
    before = seeding.random_state()
    samples.load(task, task.train_data, [(0, 3), (0, 5)], 7)
    assert seeding.same_random_state(before, seeding.random_state())
    for draw in (random.random, np.random.rand, lambda: torch.rand(())):
        state = seeding.random_state()
        draw()
        assert not seeding.same_random_state(state, seeding.random_state())


@pytest.mark.parametrize("collate", [None, masking])
@pytest.mark.parametrize("kind", [Drawn, Plain])
def test_loader_processes_a_resume_and_two_ranks_load_the_same_bits(kind: type[Drawn], collate: Any) -> None:
    task = task_of(Source(kind(11), collate))  # 4 + 4 + 3
    one = loaded(task)
    assert equal(batches(one), batches(loaded(task, workers=1)))
    assert equal(batches(one), batches(loaded(task, workers=2)))
    schedule = WindowSchedule(11, 4, seed=7)
    rest = list(WindowLoader(task, schedule, Ranks(), micro_batch=2, start=2, stop=5, workers=2))
    assert equal(batches(one[2:]), batches(rest))
    halves = [loaded(task, rank=rank, world=2, stop=2) for rank in (0, 1)]
    for whole, left, right in zip(one[:2], *halves, strict=True):
        assert equal(batches([whole]), batches([left, right]))
        assert [m.position for m in whole.micro_batches] == [0, 2]
        assert (left.micro_batches[0].position, right.micro_batches[0].position) == (0, 2)


def test_samples_read_in_a_process_are_the_same_and_leave_this_one_untouched() -> None:
    for data, drawn in ((Drawn(), True), (Plain(), False), (Drawn(declared=True), True)):
        task = task_of(data)
        here = samples.read(task, data, [(0, 3), (1, 5)], 7)
        data.threads.clear()
        with samples.read_in_a_process():
            there, drew = samples.draws_random_numbers(partial(samples.read, task, data, [(0, 3), (1, 5)], 7))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True))
        assert (drew, data.threads) == (drawn, set())
    with samples.read_in_a_process(), pytest.raises(DataError, match="IndexError"):
        samples.read(task, TensorDataset(torch.zeros(2)), [(0, 7)], 0)


# What a thread may read


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read counts as slow, and is left to a thread where it may be."""
    monkeypatch.setattr(loader, "QUICK_S", -1.0)


def test_a_thread_reads_windows_only_where_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(loaded(task_of(Plain())))
    for quick_s, in_thread in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(loader, "QUICK_S", quick_s)
        data = Plain()
        assert equal(batches(loaded(task_of(data))), expected)
        assert ("gatrain-loader" in data.threads) is in_thread


@pytest.mark.usefixtures("slow_reading")
def test_a_thread_reads_only_what_is_known_to_draw_nothing() -> None:
    for data, in_thread in ((Plain(), True), (Drawn(), False), (Drawn(declared=True), False)):
        loaded(task_of(data))
        assert ("gatrain-loader" in data.threads) is in_thread
    masked = Plain()
    loaded(task_of(Source(masked, masking)))
    assert "gatrain-loader" not in masked.threads
    told = Source(Plain(), default_collate)
    told.deterministic_collate = True  # type: ignore[attr-defined]
    loaded(task_of(told))
    assert "gatrain-loader" in told.train.threads


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_draws_although_declared_is_read_seeded_and_said(workers: int) -> None:
    honest, declared = loaded(task_of(Drawn())), loaded(task_of(Drawn(declared=True)), workers)
    assert equal(batches(honest), batches(declared))
    assert [window.notices for window in declared] == [[DRAWS_UNDECLARED], [], [], [], []]
    assert not any(window.notices for window in honest)


def test_a_subclass_must_declare_for_itself() -> None:
    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return (self.tensors[0][index] + torch.randn(()),)

    class Louder(Plain):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return super().__getitem__(index)[0] + torch.randn(()), torch.zeros(1)

    class Told(Louder):
        deterministic = True

    x = torch.zeros(4, 3)
    expected = {TensorDataset(x): True, Augmented(x): False, Plain(): True, Louder(): False, Told(): True}
    assert {data: is_deterministic(data) for data in expected} == expected


def test_draws_are_noticed_inside_seeded_reading() -> None:
    task = task_of(Source(Plain(), masking))
    keys = [(0, 1), (0, 2)]
    read, drew = samples.draws_random_numbers(lambda: samples.read(task, task.train_data, keys, 0))
    assert not drew
    _, drew = samples.draws_random_numbers(lambda: samples.collated(task, read, keys, 0))
    assert drew
    assert samples.draws_random_numbers(lambda: random.random())[1]
    assert not samples.draws_random_numbers(lambda: 1)[1]


# Memory


def test_what_is_loaded_ahead_has_room_in_main_and_shared_memory() -> None:
    free = FreeMemory(1000 * MIB, 100 * MIB)
    assert bounded(2, MIB, 4 * MIB, free) == ReadAhead(2, PREFETCH, next_window=True)
    cut = bounded(8, 10 * MIB, 20 * MIB, free)  # half of /dev/shm holds 5 of 10 MiB
    assert (cut.workers, cut.prefetch, cut.next_window) == (5, 1, True)
    assert "train.data_workers=8 would hold 320 MiB ahead" in (cut.notice or "")
    assert bounded(8, 10 * MIB, 20 * MIB, FreeMemory(1000 * MIB, None)).prefetch == PREFETCH
    late = bounded(0, 10 * MIB, 300 * MIB, free)
    assert (late.next_window, "only when the one before it is done" in (late.notice or "")) == (False, True)
    with pytest.raises(
        DoesNotFitError, match=r"this rank's part of a window is 1\.2 GiB, and 1,000 MiB .*batch\.effective"
    ):
        bounded(0, MIB, 1200 * MIB, free)
    with pytest.raises(DoesNotFitError, match=r"/dev/shm.*train\.data_workers=0"):
        bounded(1, 60 * MIB, 60 * MIB, free)


@pytest.mark.usefixtures("slow_reading")
def test_windows_are_the_same_however_little_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(Drawn(11))
    plain = task_of(Plain(11))
    expected, ahead = batches(loaded(task)), loaded(plain)
    assert "gatrain-loader" in plain.train_data.threads  # type: ignore[attr-defined]
    little = FreeMemory(70, 200)  # a window of 4 samples is 64 bytes
    monkeypatch.setattr(FreeMemory, "of_this_rank", lambda: little)
    assert equal(batches(loaded(task, workers=2)), expected)
    (told, *rest) = loaded(task, workers=2)
    assert "1 process with 1 each read ahead; a window" in told.notices[0]
    assert not any(window.notices for window in rest)
    plain.train_data.threads.clear()  # type: ignore[attr-defined]
    assert equal(batches(loaded(plain)), batches(ahead))
    assert "gatrain-loader" not in plain.train_data.threads  # type: ignore[attr-defined]


# Counting


def test_samples_are_counted_as_samples() -> None:
    boxes = [torch.zeros(7, 4), torch.zeros(2, 4), torch.zeros(7, 4)]
    images = torch.zeros(3, 3, 8, 8)
    assert samples_in(torch.zeros(5, 2)) == 5
    assert samples_in(boxes) == 3
    assert samples_in(boxes[::2], images[:2]) == 2
    assert samples_in([{"boxes": box} for box in boxes], list(images)) == 3
    assert samples_in({"boxes": torch.zeros(3, 4), "labels": torch.zeros(3), "scale": torch.ones(())}) == 3
    columns = [torch.zeros(8), torch.zeros(8, 2)]  # as default_collate makes of (x, (a, b))
    assert samples_in(columns, torch.zeros(8, 3)) == 8
    with pytest.raises(ConfigError, match=r"boxes: \[7, 4\].*task.weight"):
        samples_in({"boxes": torch.zeros(7, 4), "labels": torch.zeros(3)})


def mean_over_images(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.mean()


def concatenated(listed: list[Any]) -> Any:
    return torch.stack([x for x, _ in listed]), torch.cat([torch.zeros(3, 4) for _ in listed])


def test_a_count_that_is_not_the_samples_is_refused_with_both_numbers() -> None:
    task = task_of(Source(Plain(), concatenated), mean_over_images)
    with pytest.raises(DataError, match=r"4 samples were collated .* count as 12 samples.*task\.weight"):
        samples.load(task, task.train_data, [(0, i) for i in range(4)], 0)
    weighed = task_of(
        Source(Plain(), concatenated), mean_over_images, weight=lambda targets: len(targets) / 3
    )
    assert samples.load(weighed, weighed.train_data, [(0, i) for i in range(4)], 0).weights == {"loss": 4}


class Broken(Plain):
    def __getitem__(self, index: int) -> Any:
        return None if index in (3, 4) else super().__getitem__(index)


def readable(listed: list[Any]) -> Any:
    return default_collate([sample for sample in listed if sample is not None])


def short_ones(listed: list[Any]) -> Any:
    return default_collate([sample for sample in listed if float(sample[0][0]) < 9])


def test_dropped_samples_are_counted_out_down_to_an_empty_batch() -> None:
    for loss in (nn.MSELoss(), mean_over_images):
        task = task_of(Source(Broken(), readable), loss)
        some = samples.load(task, task.train_data, [(0, 2), (0, 3)], 0)
        assert (some.samples, some.dropped, some.is_empty) == (1, 1, False)
        none = samples.load(task, task.train_data, [(0, 3), (0, 4)], 0)
        assert (none.samples, none.dropped, none.is_empty) == (0, 2, True)
        found = loaded(task, stop=3)
        assert sum(window.counts["samples"] for window in found) == 10
        assert sum(window.counts["dropped"] for window in found) == 2
    chosen = task_of(Source(Plain(), short_ones), mean_over_images)
    some = samples.load(chosen, chosen.train_data, [(0, 8), (0, 9), (0, 10)], 0)
    assert (some.samples, some.dropped) == (1, 2)


def test_unreadable_samples_that_nothing_drops_are_refused_with_advice() -> None:
    task = task_of(Broken())
    for keys in ([(0, 3)], [(0, 3), (0, 5)]):
        with pytest.raises(DataError, match="cannot"):
            samples.load(task, task.train_data, keys, 0)
    with pytest.raises(DataError, match=r"gives None for the samples 3.*leave None out"):
        samples.load(task, task.train_data, [(0, 3)], 0)


def test_collate_may_take_entries_out_of_samples_that_are_kept() -> None:
    def popping(listed: list[Any]) -> Any:
        return torch.stack([sample.pop("x") for sample in listed]), torch.tensor(
            [sample["n"].pop() for sample in listed]
        )

    task = task_of(Source(Plain(), popping))
    kept = [{"x": torch.ones(3), "n": [1.0]}] * 2
    for _ in range(2):
        assert samples.make(task, kept, [(0, 0), (0, 0)], 0).samples == 2
    assert kept[0]["n"] == [1.0]


# Batches of any form

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Held:
    x: Tensor
    name: str = "n"


class Encoding(UserDict):  # type: ignore[type-arg]
    pass


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.me = self

    def to(self, device: Any) -> Graph:
        self.x = self.x.to(device)
        return self


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    ("batch", "tensor"),
    [
        ({"a": [{"x": torch.ones(2)}], "n": None, "s": "text"}, lambda b: b["a"][0]["x"]),
        (Pair(torch.ones(2), 1), lambda b: b.x),
        (Held(torch.ones(2)), lambda b: b.x),
        (Encoding(x=torch.ones(2)), lambda b: b["x"]),
        (Graph(torch.ones(2)), lambda b: b.x),
        (Slotted(torch.ones(2)), lambda b: b.x),
        (pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), lambda b: b.data),
    ],
)
def test_every_tensor_of_a_batch_moves_and_the_batch_stays_as_it_was(batch: Any, tensor: Any) -> None:
    moved = move_to(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert tensor(moved).device.type == "meta"
    assert tensor(batch).device.type == "cpu"
    double = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    assert tensor(double).dtype == torch.float64
    assert tensor(batch).dtype == torch.float32
    assert bytes_of(batch) >= 8
    assert map_tensors(lambda t: t, batch) is batch


def test_batches_are_cut_into_samples_or_not_at_all() -> None:
    x, y = torch.arange(10).view(5, 2), torch.arange(5)
    whole = {
        "x": x,
        "pair": Pair(y, [f"{i}" for i in range(5)]),
        "scale": 2.0,
        "boxes": [torch.ones(i, 4) for i in y],
    }
    first, second = samples.split_batch(whole, [2, 3], 5) or []
    assert torch.equal(torch.cat([first["x"], second["x"]]), x)
    assert second["pair"].y == ["2", "3", "4"]
    assert [len(box) for box in second["boxes"]] == [2, 3, 4]
    assert first["scale"] == 2.0
    parts = samples.split_batch([x[:2], y[:2]], [1, 1], 2) or []
    assert torch.equal(parts[1][1], y[1:2])
    assert samples.split_batch({"x": x, "total": torch.tensor(5)}, [2, 3], 5) is None
    assert samples.split_batch(pack_sequence([torch.ones(3), torch.ones(2)]), [1, 1], 2) is None


def test_every_held_out_sample_is_evaluated_once_and_drawing_batches_are_those_of_one_rank() -> None:
    for collate in (None, masking):
        task = task_of(Source(Plain(), collate))
        one = evaluation_keys(task, Ranks(), 11, 2)
        two = [keys for rank in (0, 1) for keys in evaluation_keys(task, Ranks(rank, 2), 11, 2)]
        for found in (one, two):
            assert sorted(sample for keys in found for _, sample in keys) == list(range(11))
        assert (sorted(one) == sorted(two)) is (collate is masking)


# Windows and splits


def test_drop_last_leaves_out_the_short_window_only() -> None:
    kept, dropped = WindowSchedule(11, 4, 3), WindowSchedule(11, 4, 3, drop_last=True)
    assert (kept.per_epoch, dropped.per_epoch) == (3, 2)
    assert [len(dropped.window(n).ids) for n in range(5)] == [4] * 5
    assert dropped.window(1).ids.tolist() == kept.window(1).ids.tolist()
    assert dropped.window(2).ids.tolist() == kept.window(3).ids.tolist()
    assert dropped.steps(None, 2) == 4
    own = windows(11, 4, seed=3, drop_last=True)
    assert [next(own) for _ in range(3)] == [dropped.window(n).ids.tolist() for n in range(3)]
    states = [Progress(1, 4, 0, 4, 3, 11, drop_last=drop) for drop in (False, True)]
    with pytest.raises(SavedStateError, match=r"train\.drop_last was False and is True"):
        check_same_run(*states)


def test_a_mapping_of_splits_is_not_one_sample() -> None:
    train, test = Plain(), Plain(3)
    assert find_splits({"train": train, "test": test}) == (train, test)
    assert find_splits({"train": train}) == (train, None)
    held_out = find_splits({"train": train}, 0.25)[1]
    assert held_out is not None
    assert len(held_out) == 3
    with pytest.raises(ConfigError, match=r"splits 'a', 'b'.*data\['a'\]"):
        find_splits({"a": train, "b": test})
    with pytest.raises(ConfigError, match="not a dataset of samples"):
        find_splits(Source({"train": train}))


class OpenFile(Plain):
    """As data sets of HDF5 or LMDB files: opened at the first sample, and broken if another process inherits it."""

    opened_by: int | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.opened_by = self.opened_by or os.getpid()
        if self.opened_by != os.getpid():
            raise OSError("the file was opened by another process")
        return super().__getitem__(index)


def test_no_loader_process_inherits_what_a_sample_opened() -> None:
    task = task_of(OpenFile())
    with samples.read_in_a_process():
        samples.read_one(task, task.train_data, (0, 1), 0)
    assert len(batches(loaded(task, workers=2))) == 20
    assert task.train_data.opened_by is None  # type: ignore[attr-defined]


# What a window held


def checked(window: LoadedWindow, **changes: int) -> None:
    """The trainer's comparison of one window that a single rank has computed."""
    counts = {**window.counts, **changes}
    trainer: Any = SimpleNamespace(
        plan=SimpleNamespace(micro_batch=2), engine=SimpleNamespace(ranks=SimpleNamespace(world_size=1))
    )
    Trainer._check_window(trainer, window, cast("Any", SimpleNamespace(counts=counts)))


def test_samples_and_digest_of_a_window_are_those_that_its_micro_batches_held() -> None:
    task, schedule = task_of(Plain()), WindowSchedule(11, 4, seed=7)
    (window,) = WindowLoader(task, schedule, Ranks(), micro_batch=2, start=0, stop=1)
    assert window.counts["samples"] == window.window_samples == 4
    assert window.counts["digest"] == window.window_digest
    checked(window)
    # a micro-batch below zero cuts a share into nothing: so are the counts
    (nothing,) = WindowLoader(task, schedule, Ranks(), micro_batch=-3, start=0, stop=1)
    assert (nothing.counts["samples"], nothing.counts["digest"], nothing.micro_batches) == (0, 0, [])
    with pytest.raises(ExactnessError, match="step 1 computed 0 samples instead of the 4 of its window"):
        checked(nothing)
    with pytest.raises(ExactnessError, match="3 samples"):
        checked(window, samples=3)
    with pytest.raises(ExactnessError, match="8 samples"):
        checked(window, samples=8)
    with pytest.raises(ExactnessError, match="other samples"):
        checked(window, digest=window.window_digest + 1)
    checked(window, samples=1, dropped=3)  # those that collate leaves out are counted by their number


# Whole batches in one call


class Rows(torch.utils.data.Dataset[Any]):
    """Declared data that also gives whole batches."""

    deterministic = True

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), float(index)), torch.tensor([0.0])

    def batch_of(self, indices: list[int]) -> Any:
        return [torch.tensor(indices).float()[:, None].repeat(1, 2), torch.zeros(len(indices), 1)]


class Changed(Rows):
    """Samples of its own: the inherited `batch_of` is not theirs."""

    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), -float(index)), torch.tensor([0.0])


def test_data_in_tensors_gives_the_batches_that_its_samples_one_by_one_would() -> None:
    x = torch.randn(11, 3, 4, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    tensors = torch.utils.data.TensorDataset(x, torch.arange(11.0)[:, None])
    keys = [(0, index) for index in (3, 3, 10, 0)]
    for data in (tensors, Rows(), Changed(), digits.TensorSamples(x, torch.arange(11) % 2)):
        task = task_of(data)
        found = samples.load(task, data, keys, 0)
        one_by_one = default_collate([data[index] for _, index in keys])  # type: ignore[index]
        assert type(found.batch) is type(one_by_one)
        for mine, theirs in zip(found.batch, one_by_one, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.stride() == theirs.stride()
        assert (found.samples, found.keys) == (4, tuple(keys))
