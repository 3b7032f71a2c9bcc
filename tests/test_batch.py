"""The arithmetic of micro-batches: as few as it takes, as equal as they can be, and every sample once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatrain import batch
from gatrain.batch import Split
from gatrain.plan import Plan, StepSettings

SHARES = st.integers(0, 5000)
SIZES = st.integers(1, 600)


@given(SHARES, SIZES)
def test_a_share_is_cut_into_as_few_and_as_equal_micro_batches_as_can_be(
    share: int, micro_batch: int
) -> None:
    sizes = batch.micro_batch_sizes(share, micro_batch)
    assert sum(sizes) == share
    assert len(sizes) == -(-share // micro_batch)  # evening costs no micro-step
    assert all(0 < size <= micro_batch for size in sizes)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1  # so at most two shapes are compiled
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 200), SIZES)
def test_a_share_that_divides_stays_as_it_is(steps: int, micro_batch: int) -> None:
    assert batch.micro_batch_sizes(steps * micro_batch, micro_batch) == [micro_batch] * steps


@given(st.integers(2, 5000), st.integers(2, 600))
def test_a_single_sample_is_left_over_only_where_nothing_else_fits(share: int, micro_batch: int) -> None:
    """3 samples by 2 cannot be two micro-batches without a single one; anything with room to even out is."""
    if 1 in batch.micro_batch_sizes(share, micro_batch):
        assert share < 2 * -(-share // micro_batch)


@given(st.integers(1, 5000), SIZES)
def test_the_evened_size_gives_the_same_cut(share: int, micro_batch: int) -> None:
    size = batch.even_size(share, micro_batch)
    sizes = batch.micro_batch_sizes(share, micro_batch)
    assert size == max(sizes)
    assert batch.micro_batch_sizes(share, size) == sizes


@given(st.integers(1, 3000), st.integers(1, 9), st.integers(1, 3000))
def test_the_equation_that_is_shown_multiplies_out(effective: int, world_size: int, micro_batch: int) -> None:
    way = StepSettings("fp32", "none", False, "window")
    most = Split(effective, world_size).share
    plan = Plan(
        split=Split(effective, world_size), micro_batch=min(micro_batch, most), settings=way, reason=""
    )
    left, right = plan.equation.split(" = ")
    for words in ("ranks", "rank", "accumulation steps", "accumulation step"):
        right = right.replace(words, "")
    assert eval(right.replace("x", "*")) == int(left) == effective


@pytest.mark.parametrize(
    ("share", "micro_batch", "sizes"),
    [(9, 4, [3, 3, 3]), (23, 4, [4, 4, 4, 4, 4, 3]), (5, 4, [3, 2]), (1, 4, [1]), (512, 16, [16] * 32)],
)
def test_known_cuts(share: int, micro_batch: int, sizes: list[int]) -> None:
    assert batch.micro_batch_sizes(share, micro_batch) == sizes
