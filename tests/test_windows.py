"""The promise: window n depends on (data, seed, effective batch, n) alone, and every epoch covers the data once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatrain import windows
from gatrain.errors import DataError
from gatrain.train.order.permutation import permutation
from gatrain.train.windows import WindowSchedule, digest


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_an_epoch_holds_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    order = permutation(samples, seed, epoch, np.arange(samples))
    assert sorted(order.tolist()) == list(range(samples))


def test_a_billion_samples_cost_nothing() -> None:
    schedule = WindowSchedule(samples=10**9, effective_batch=512, seed=0)
    ids = schedule.window(1_500_000).ids
    assert len(set(ids.tolist())) == 512
    assert ids.max() > 5 * 10**8


def test_orders_differ_between_epochs_and_seeds_and_look_uniform() -> None:
    samples = 64
    first = np.stack([permutation(samples, 0, epoch, np.arange(samples)) for epoch in range(2000)])
    # how often each sample stands in each quarter of the epoch: 500 expected, sd 19
    for sample in (0, 1, 31, 63):
        places = np.argmax(first == sample, axis=1) // 16
        assert np.all(np.abs(np.bincount(places, minlength=4) - 500) < 100)
    assert not np.array_equal(first[0], permutation(samples, 1, 0, np.arange(samples)))
    neighbours = np.abs(np.diff(first, axis=1)) == 1
    assert neighbours.mean() < 0.06  # 2/64 by chance


def test_the_last_window_of_an_epoch_is_short_and_nothing_is_dropped() -> None:
    schedule = WindowSchedule(samples=10, effective_batch=4, seed=0)
    sizes = [len(schedule.window(index).ids) for index in range(6)]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert schedule.steps(None, 1.5) == 5
    assert schedule.steps(7, None) == 7


def test_each_epoch_has_all_samples_in_an_order_of_its_own() -> None:
    schedule = WindowSchedule(samples=40, effective_batch=16, seed=0)
    epochs = [[int(i) for nth in range(3) for i in schedule.window(3 * epoch + nth).ids] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_too_little_data_is_refused_and_never_shrinks_the_batch() -> None:
    with pytest.raises(DataError, match=r"9 samples.*batch.effective=10"):
        WindowSchedule(samples=9, effective_batch=10, seed=0)


def test_the_fingerprint_adds_up_over_ranks_and_sees_order() -> None:
    window = WindowSchedule(samples=500, effective_batch=101, seed=3).window(2)
    whole = digest(0, window.ids)
    for world_size in (2, 3, 8):
        assert sum(digest(*window.slice_of(rank, world_size)) for rank in range(world_size)) == whole
    swapped = window.ids.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert digest(0, swapped) != whole


def test_the_library_form_gives_each_rank_its_part() -> None:
    one = list(itertools.islice(windows(50, 8, seed=1), 9))
    two = [list(itertools.islice(windows(50, 8, seed=1, rank=r, world_size=2), 9)) for r in range(2)]
    assert one == [a + b for a, b in zip(*two, strict=True)]
    assert list(itertools.islice(windows(50, 8, seed=1, start=4), 2)) == one[4:6]
