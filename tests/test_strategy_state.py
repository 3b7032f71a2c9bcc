"""What a gradient strategy of one's own keeps between windows is saved, or told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gatrain.errors import SavedStateError
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.kept import StrategyState
from gatrain.train.gradient.plain import Plain
from gatrain.train.parts import join, split


class Remembers(GradientStrategy):
    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.windows = 0
        self.is_first = True

    def __call__(self, window: Any, step: Any) -> None:
        self.before = [torch.full((2,), float(self.windows))]
        self.windows += 1
        self.is_first = False


class Saves(Remembers):
    def state_dict(self) -> Mapping[str, Any]:
        return {"before": self.before, "windows": self.windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before, self.windows = state["before"], state["windows"]


def window(strategy: GradientStrategy) -> None:
    strategy(None, None)  # type: ignore[arg-type]


def test_what_it_gives_comes_back_and_nothing_is_told() -> None:
    first, again = Saves(), Saves()
    state = StrategyState(first)
    window(first)
    saved = join(*split(state.parts()["gradient"], "gradient"))
    StrategyState(again).load(parts := {"gradient": saved})
    assert parts == {}
    assert again.windows == 1
    assert torch.equal(again.before[0], first.before[0])
    assert state.unsaved() == ""


def test_what_changed_and_is_not_saved_is_told_by_name() -> None:
    strategy = Remembers()
    state = StrategyState(strategy)
    assert state.unsaved() == ""
    window(strategy)
    assert "Remembers has changed before, windows since the start" in state.unsaved()
    assert state.parts() == {}


def test_a_strategy_that_says_it_keeps_nothing_is_believed() -> None:
    class Nothing(Remembers):
        def state_dict(self) -> Mapping[str, Any]:
            return {}

    state = StrategyState(strategy := Nothing())
    window(strategy)
    assert state.unsaved() == ""
    assert StrategyState(Plain()).unsaved() == ""


def test_a_state_without_a_taker_or_a_taker_without_a_state_is_refused() -> None:
    class GivesAlone(Remembers):
        def state_dict(self) -> Mapping[str, Any]:
            return {"windows": self.windows}

    with pytest.raises(SavedStateError, match="has no load_state_dict"):
        StrategyState(GivesAlone()).load({"gradient": {"windows": 1}})
    with pytest.raises(SavedStateError, match="has saved none of it"):
        StrategyState(Saves()).load({})
    with pytest.raises(SavedStateError, match="holds a set"):
        StrategyState(type("Odd", (Saves,), {"state_dict": lambda self: {"a": {1}}})())
