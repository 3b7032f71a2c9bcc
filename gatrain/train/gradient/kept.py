"""What a gradient strategy keeps from one window to the next: saved with the run, or told where it is not."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatrain.errors import SavedStateError
from gatrain.train.gradient import GradientStrategy
from gatrain.train.parts import check

PART = "gradient"
"""Of a saved state (`gatrain.states.RESERVED`)."""
_DEEP = 3
_MOST = 100
"""Items of a list or a mapping that are looked at."""


class StrategyState:
    """The state of one strategy in saved states.

    Args:
        strategy: set up, before the first window.

    Raises:
        SavedStateError: its state holds what no file can.
    """

    def __init__(self, strategy: GradientStrategy) -> None:
        self._strategy = strategy
        self._name = type(strategy).__name__
        self._begun = self._signs()
        check(strategy.state_dict(), f"gradient strategy {self._name}")

    def parts(self) -> dict[str, Any]:
        """The part of a saved state; none where it keeps nothing. On rank 0."""
        state = dict(self._strategy.state_dict())
        return {PART: state} if state else {}

    def load(self, parts: dict[str, Any]) -> None:
        """Take this part out of those of a saved state. Called on every rank.

        Raises:
            SavedStateError: the strategy does not take it, or keeps a state that was not saved.
        """
        part = parts.pop(PART, None)
        keeps = bool(self._strategy.state_dict())
        if part is None and not keeps:
            return
        if not isinstance(part, dict):
            raise SavedStateError(
                f"the gradient strategy {self._name} keeps a state, and this run has saved none of it: its class "
                "was another one then. Start a new run, or put the class back."
            )
        if type(self._strategy).load_state_dict is GradientStrategy.load_state_dict:
            raise SavedStateError(
                f"the gradient strategy {self._name} has saved a state and has no load_state_dict(self, state) "
                "that takes it back."
            )
        self._strategy.load_state_dict(part)

    def unsaved(self) -> str:
        """A sentence where an own strategy has changed attributes and says nothing of a state; else ''."""
        if type(self._strategy).state_dict is not GradientStrategy.state_dict:
            return ""
        now = self._signs()
        changed = sorted(name for name in now if now[name] != self._begun.get(name))
        if not changed:
            return ""
        return (
            f"the gradient strategy {self._name} has changed {', '.join(changed[:3])} since the start, and nothing "
            "of it is saved: a resumed run goes on without it. Give the class state_dict(self) and "
            "load_state_dict(self, state) for what later windows need; a state_dict that gives {} says that they "
            "need nothing."
        )

    def _signs(self) -> dict[str, Any]:
        if type(self._strategy).__module__.partition(".")[0] == "gatrain":
            return {}
        found = {name: _sign(value, 0) for name, value in vars(self._strategy).items()}
        return {name: sign for name, sign in found.items() if sign is not None}


def _sign(value: Any, depth: int) -> Any:
    """What is another where a value is; None for what is not looked into: the window in hand, the step, flags."""
    if isinstance(value, nn.Parameter | bool) or value is None:
        return None
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, int | float | complex | str | np.generic):
        return repr(value)
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.nbytes < 2**20 else id(value)
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping | list | tuple | deque | set) and depth < _DEEP:
        items = list(value.values() if isinstance(value, Mapping) else value)[:_MOST]
        return type(value).__name__, len(value), [_sign(each, depth + 1) for each in items]
    return None
