"""Unequal shares: windows stay the same, only who computes which slice changes, and so the weights are equal."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatrain.config import SGDConfig
from gatrain.plan import StepSettings
from gatrain.tasks import Supervised
from gatrain.train.engine import Engine
from gatrain.train.loader import WindowLoader
from gatrain.train.ranks import Ranks
from gatrain.train.windows import WindowSchedule, digest

SAMPLES, EFFECTIVE, STEPS = 50, 12, 6  # the fifth window of an epoch has 2 samples


def _trained(shares: list[int] | None, sync: str) -> dict[str, Any]:
    """Weights after a few SGD steps, the windows' digests, and how many samples this rank computed."""
    os.environ.pop("WORLD_SIZE", None)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    task = Supervised(lambda: model, _Double(data))
    ranks = Ranks.current()
    settings_ = StepSettings("fp32", "none", False, sync)
    engine = Engine(task, model, settings_, SGDConfig(lr=0.3, momentum=0.9), ranks, torch.device("cpu"))
    schedule = WindowSchedule(SAMPLES, EFFECTIVE, 3)
    digests, mine = [], 0
    for loaded in WindowLoader(task, schedule, ranks, micro_batch=4, shares=shares, start=0, stop=STEPS):
        mine += sum(len(m.batch[1]) for m in loaded.micro_batches)
        assert all(len(m.batch[1]) > 0 for m in loaded.micro_batches)
        result, _ = engine.step(loaded, loaded.index)
        digests.append(result.counts["digest"])
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"weights": flat, "digests": digests, "samples": mine}


class _Double(torch.utils.data.Dataset[Any]):
    """Samples in fp64, so that only a wrong gradient can tell two splits apart."""

    deterministic = True

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        x, y = self._data[index]
        return x.double(), y


def _trained_in_turn(sync: str) -> list[dict[str, Any]]:
    return [_trained(shares, sync) for shares in (None, [9, 3], [12, 0])]


@pytest.mark.parametrize("sync", ["window", "overlap"])
def test_unequal_shares_train_the_same_weights(sync: str) -> None:
    one = _trained(None, sync)
    equal, uneven, extreme = zip(*run_on_ranks(2, _trained_in_turn, sync), strict=True)
    assert [rank["samples"] for rank in equal] == [31, 31]
    assert [rank["samples"] for rank in uneven] == [9 * 5 + 2, 3 * 5]
    assert [rank["samples"] for rank in extreme] == [62, 0]
    for split in (equal, uneven, extreme):
        for rank in split:
            assert rank["digests"] == one["digests"]  # the same samples in the same places
            torch.testing.assert_close(rank["weights"], one["weights"], rtol=1e-12, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(shares=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any), samples=st.integers(1, 200))
def test_whoever_computes_it_a_window_is_the_same(shares: list[int], samples: int) -> None:
    if samples < sum(shares):
        return
    schedule = WindowSchedule(samples, sum(shares), 1)
    for index in (0, schedule.per_epoch - 1):
        window = schedule.window(index)
        parts = [window.slice_of(rank, len(shares), shares) for rank in range(len(shares))]
        assert [i for _, ids in parts for i in ids.tolist()] == window.ids.tolist()
        assert sum(digest(first, ids) for first, ids in parts) == digest(0, window.ids)
