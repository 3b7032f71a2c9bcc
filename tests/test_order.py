"""The order of samples: what each gives, the same for any number of ranks, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, WeightedRandomSampler

import gatrain
from gatrain import build
from gatrain.compose import compose
from gatrain.config import BatchConfig
from gatrain.data import Mixture
from gatrain.errors import ConfigError, SavedStateError
from gatrain.states import Progress, check_same_run
from gatrain.tasks import Supervised
from gatrain.tasks.parts import Part
from gatrain.train.loader import WindowLoader
from gatrain.train.order import check_repeats, unused_sampler
from gatrain.train.order.grouped import Grouped
from gatrain.train.order.sequential import Sequential
from gatrain.train.order.values import values_of
from gatrain.train.order.weighted import Weighted
from gatrain.train.ranks import Ranks
from gatrain.train.windows import WindowSchedule, digest

SHUFFLED, DIGEST = [94, 21, 70, 57, 51, 33, 25, 11], 148156751328
"""Of version 0.1.0."""


class Rare(Dataset[Any]):
    """95 common samples and 5 rare ones, augmented at random."""

    def __init__(self) -> None:
        self.tags = torch.tensor([0] * 95 + [1] * 5)
        self.sampler = WeightedRandomSampler(torch.where(self.tags == 1, 19.0, 1.0).tolist(), 100)
        self.lengths = [1 + nth % 10 for nth in range(100)]

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((1,), float(index)) + torch.rand(1) / 2, self.tags[index]


class Backwards:
    """An order of the user's own."""

    def __init__(self, data: Any, step: int = 1) -> None:
        self._total, self._step = len(data), step

    def ids(self, epoch: int, positions: Any) -> Any:
        return (self._total - 1 - self._step * positions) % self._total


class Beyond(Backwards):
    def ids(self, epoch: int, positions: Any) -> Any:
        return positions + 1


class Halves(Backwards):
    def ids(self, epoch: int, positions: Any) -> Any:
        return positions / 2


def schedule_of(order: Any, effective: int = 8, **given: Any) -> WindowSchedule:
    data = Rare()
    task = SimpleNamespace(train_data=data)
    config = compose(["recipe=llm"]).config
    config = SimpleNamespace(  # type: ignore[assignment]
        order=order,
        batch=BatchConfig(effective),
        train=SimpleNamespace(seed=3, drop_last=given.get("drop_last", False)),
    )
    return build.window_schedule(config, task)  # type: ignore[arg-type]


def ids_of(schedule: WindowSchedule, windows: int, start: int = 0) -> list[int]:
    return [i for n in range(start, start + windows) for i in schedule.window(n).ids.tolist()]


def test_shuffled_windows_are_those_of_every_version_before() -> None:
    assert schedule_of("shuffle").window(0).ids.tolist() == WindowSchedule(100, 8, 3).window(0).ids.tolist()
    assert WindowSchedule(100, 8, 3).window(14).ids.tolist() == SHUFFLED
    assert digest(0, WindowSchedule(1000, 64, 0).window(20).ids) == DIGEST


def test_sequential_is_the_datas_own_order_in_every_epoch() -> None:
    schedule = schedule_of("sequential")
    assert ids_of(schedule, 13) == list(range(100)) == ids_of(schedule, 13, start=13)
    own = itertools.islice(gatrain.windows(10, 4, order=Sequential()), 4)
    assert list(own) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    dropping = schedule_of("sequential", drop_last=True)
    assert ids_of(dropping, 13) == [*range(96), *range(8)]


def test_rare_samples_are_drawn_as_often_as_common_ones_where_the_weights_say_so() -> None:
    schedule = schedule_of({"name": "weighted", "weights": "sampler.weights"}, effective=50)
    drawn = np.array(ids_of(schedule, 400))  # 20,000 draws, half of them of the 5 rare samples
    assert abs((drawn >= 95).mean() - 0.5) < 4 * 0.5 / len(drawn) ** 0.5
    times = np.bincount(drawn, minlength=100)
    expected = np.where(np.arange(100) >= 95, 2000.0, 20000 * 0.5 / 95)
    # chi-square with 99 degrees of freedom: below 149 in 999 of 1000
    assert ((times - expected) ** 2 / expected).sum() < 149
    assert "an epoch is 100 draws with replacement" in schedule.order.sentence  # type: ignore[union-attr]
    zero = Weighted(Rare(), 0, [1.0, 0.0] * 50, samples=1000)
    assert not (zero.ids(0, np.arange(1000)) % 2).any()


def test_weights_that_add_up_to_more_than_a_float_holds_are_still_shares() -> None:
    plain, huge = (Weighted(Rare(), 0, [scale] * 100, samples=1000) for scale in (1.0, 1e308))
    assert torch.equal(*(torch.from_numpy(each.ids(0, np.arange(1000))) for each in (plain, huge)))


def test_a_number_of_samples_is_a_whole_one() -> None:
    with pytest.raises(ConfigError, match=r"order\.samples=1000\.0 is not a whole number"):
        Weighted(Rare(), 0, [1.0] * 100, samples=1e3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.samples=1000\.0 is not a whole number"):
        Mixture([Rare()], samples=1e3)  # type: ignore[arg-type]


def test_a_run_does_not_go_on_with_other_weights() -> None:
    one, other = (Weighted(Rare(), 0, [float(n), *[1.0] * 99]) for n in (1, 2))
    assert one.fingerprint == Weighted(Rare(), 5, [1.0] * 100).fingerprint != other.fingerprint
    before = Progress(3, 24, 0, 8, 3, 100, order=one.fingerprint)
    check_same_run(before, Progress(0, 0, 0, 8, 3, 100, order=one.fingerprint))
    with pytest.raises(SavedStateError, match="the fingerprint of the weights or lengths of the order was"):
        check_same_run(before, Progress(0, 0, 0, 8, 3, 100, order=other.fingerprint))


def test_a_sample_that_is_drawn_twice_is_augmented_in_two_ways_whoever_reads_it() -> None:
    task = Supervised(torch.nn.Identity, Rare(), torch.nn.CrossEntropyLoss())
    schedule = schedule_of({"name": "weighted", "weights": "sampler.weights"}, effective=50)

    def read(rank: int, ranks: int, micro: int) -> list[float]:
        loader = WindowLoader(task, schedule, Ranks(rank, ranks), micro_batch=micro, start=1, stop=2)
        return [float(x) for window in loader for micro in window.micro_batches for x in micro.batch[0]]

    whole = read(0, 1, 50)
    assert read(0, 2, 7) + read(1, 2, 3) == whole
    assert len(set(whole)) == 50 > len({int(x) for x in whole})


def test_grouped_windows_hold_samples_of_like_length_each_once_an_epoch() -> None:
    data = Rare()
    order = Grouped(data, 3, 8)
    epochs = [order.ids(epoch, np.arange(100)) for epoch in (0, 1)]
    assert all(sorted(ids.tolist()) == list(range(100)) for ids in epochs)
    assert not np.array_equal(*epochs)
    lengths = np.array(data.lengths)
    for ids in epochs:
        spans = [np.ptp(lengths[window]) for window in ids[:96].reshape(-1, 8)]
        assert max(spans) <= 1  # 12 windows over lengths 1 to 10, against 7 to 9 when shuffled
        longest = [lengths[window].max() for window in ids[:96].reshape(-1, 8)]
        assert longest not in (sorted(longest), sorted(longest, reverse=True))
    assert np.array_equal(Grouped(data, 3, 8).ids(1, np.arange(40, 48)), epochs[1][40:48])


def test_an_order_of_the_users_own_goes_by_its_class_and_is_looked_at() -> None:
    assert schedule_of({"_target_": "test_order.Backwards", "step": 3}).window(1).ids.tolist() == [
        (99 - 3 * position) % 100 for position in range(8, 16)
    ]
    with pytest.raises(ConfigError, match="gave the sample 100, but the data has the samples 0 to 99"):
        schedule_of({"_target_": "test_order.Beyond"}).window(12)
    with pytest.raises(ConfigError, match="gave float64"):
        schedule_of({"_target_": "test_order.Halves"}).window(0)
    with pytest.raises(ConfigError, match=r"no method ids\(epoch, positions\)"):
        schedule_of({"_target_": "test_order.Rare"})


def test_a_misspelt_order_is_refused_with_the_nearest(tmp_path: Path) -> None:
    for given, message in (
        ("order=sequental", "order=sequental is not one of shuffle, sequential, weighted, grouped."),
        ("order={name: weighted, wights: tags}", "order.wights is not an argument"),
        ("order={name: weighted}", "needs the argument 'weights'"),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            build.check_targets(compose(["recipe=llm", given]).config)


def test_weights_come_from_a_file_an_attribute_or_a_function(tmp_path: Path) -> None:
    data = Rare()
    wanted = data.tags.double().numpy()
    np.save(tmp_path / "w.npy", wanted)
    np.savetxt(tmp_path / "w.txt", wanted)
    for given in (str(tmp_path / "w.npy"), str(tmp_path / "w.txt"), "tags", data.tags, lambda d: d.tags):
        assert np.array_equal(values_of(data, given, "order.weights"), wanted)
    part = Part(data, 90, 98)
    assert values_of(part, "tags", "order.weights").tolist() == [0] * 5 + [1] * 3
    subset = torch.utils.data.Subset(data, [0, 99, 1])
    assert values_of(subset, "tags", "order.weights").tolist() == [0, 1, 0]
    for given, message in (
        ("tag", "neither a file here nor an attribute"),
        ([1.0], "gives 1 numbers for 100 samples"),
        (-data.tags, "-1 for the sample 95"),
    ):
        with pytest.raises(ConfigError, match=message):
            values_of(data, given, "order.weights")
    with pytest.raises(ConfigError, match="all zero"):
        Weighted(data, 0, [0.0] * 100)


def test_a_sampler_of_the_data_is_not_passed_over_in_silence() -> None:
    assert "order={name: weighted, weights: sampler.weights}" in unused_sampler(Rare())
    assert unused_sampler([1, 2]) == ""


class CountsCalls:
    def __init__(self, data: Any) -> None:
        self.samples, self.calls = len(data), 0

    def ids(self, epoch: int, positions: Any) -> Any:
        self.calls += 1
        return np.random.default_rng(self.calls).permutation(self.samples)[positions]


class DrawsWhenMade:
    def __init__(self, data: Any) -> None:
        self.order = np.random.default_rng().permutation(len(data))

    def ids(self, epoch: int, positions: Any) -> Any:
        return self.order[positions]


class ByEpoch(CountsCalls):
    def ids(self, epoch: int, positions: Any) -> Any:
        return np.random.default_rng([7, epoch]).permutation(self.samples)[positions]


@pytest.mark.parametrize("kind", [CountsCalls, DrawsWhenMade])
def test_an_order_that_a_resumed_run_could_not_repeat_is_refused(kind: type[CountsCalls]) -> None:
    data = range(50)
    with pytest.raises(ConfigError, match="a resumed run would train on other samples"):
        check_repeats(kind(data), kind(data), 12)
    check_repeats(ByEpoch(data), ByEpoch(data), 12)
