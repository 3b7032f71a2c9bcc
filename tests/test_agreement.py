"""Ranks that have come apart are told: rank 0's weights and hooks are what is saved."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from distributed import run_on_ranks
from torch import nn

from gatrain import Hook
from gatrain.train.agreement import ranks_differ
from gatrain.train.gradient.plain import Plain
from gatrain.train.hooks import Hooks
from gatrain.train.module_numbers import ModuleNumbers
from gatrain.train.ranks import Ranks
from gatrain.train.records import StepRecord


class Keeps(Hook):
    def __init__(self, **kept: Any) -> None:
        self.kept = kept

    def state_dict(self) -> Mapping[str, Any]:
        return self.kept


class ErrorFeedback(Plain):
    """Keeps what compression has left over, which is each rank's own."""

    def __init__(self, left: float) -> None:
        self.left = left

    def state_dict(self) -> Mapping[str, Any]:
        return {"left": self.left}


def told() -> list[list[str]]:
    ranks = Ranks.current()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).double(), nn.Linear(1, 1).half())
    same = Hooks({"same": Keeps(n=1, mean=torch.ones(2))}, ranks)
    plain, own = Plain(), ErrorFeedback(ranks.rank)
    found = [ranks_differ(model, same, ranks, plain)]
    found.append(ranks_differ(model, Hooks({"own": Keeps(n=ranks.rank)}, ranks), ranks, plain))
    hooks = Hooks({"tensor": Keeps(x=torch.full((2,), ranks.rank))}, ranks)
    found.append(ranks_differ(model, hooks, ranks, plain))
    found.append(ranks_differ(model, same, ranks, own))
    with torch.no_grad():
        model[2].bias += 0.25 * ranks.rank  # type: ignore[operator]
    found.append(ranks_differ(model, same, ranks, plain))
    return found


def test_weights_and_states_that_are_others_on_some_rank_are_told_and_equal_ones_are_not() -> None:
    for equal, number, tensor, strategy, weights in run_on_ranks(2, told):
        assert equal == []
        assert "the hook own has another state on each rank" in number[0]
        assert "the hook tensor has another state on each rank" in tensor[0]
        assert "different weights by now (2.bias of rank 1 is not that of rank 0)" in weights[0]
        assert "the gradient strategy ErrorFeedback has another state on each rank" in strategy[0]
        assert len(number) == len(tensor) == len(strategy) == len(weights) == 1


def test_attributes_of_modules_that_change_are_told() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1))
    numbers = ModuleNumbers(model)
    assert numbers.unsaved() == ""
    model[1].p = 0.3
    assert "p of Dropout ('1') is another than at the start and is not saved" in numbers.unsaved()


class Draws(Hook):
    def measured(self, record: StepRecord) -> Mapping[str, float]:
        return {"drawn": float(torch.rand(())) + random.random() + float(np.random.rand())}


def test_what_a_hook_draws_in_measured_follows_from_the_step_wherever_metrics_leave_the_device() -> None:
    def drawn(*steps: int) -> list[float]:
        torch.seed()
        hooks = Hooks({"draws": Draws()}, Ranks(), seed=3)
        records = [StepRecord(step, 1.0, 1.0, 0.1, 4, 1.0, 1.0, "w") for step in steps]
        return [hooks.measured(record).metrics["drawn"] for record in records]

    whole = drawn(1, 2, 3, 4)
    assert len(set(whole)) == 4
    assert drawn(3, 4) == whole[2:]
