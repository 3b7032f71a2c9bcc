"""The best value of an evaluation's number so far, as hooks that watch one need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import ConfigError, SavedStateError, nearest

MODES = ("min", "max")


@dataclass
class Best:
    """The best value so far.

    Args:
        hook: whose it is, for messages.
        metric: its name in evaluations.jsonl: ``loss``, ``accuracy``, ``ema.loss``.
        mode: whether ``min`` or ``max`` is better.
        min_delta: by how much a value must be better to count.
    """

    hook: str
    metric: str
    mode: str
    min_delta: float = 0.0
    value: float | None = None
    step: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"{self.hook}: mode={self.mode} is not one of {', '.join(MODES)}.")
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f"{self.hook}: min_delta={self.min_delta} is not a number of at least 0.")

    def check(self, config: RunConfig) -> None:
        """
        Raises:
            ConfigError: there are no evaluations while the run trains.
        """
        if not config.eval.every:
            raise ConfigError(
                f"{self.hook} needs evaluations while the run trains. Add for example eval.every=100."
            )

    def improves(self, step: int, numbers: Mapping[str, Any]) -> bool:
        """Take the value of an evaluation; whether it is the best so far.

        Raises:
            ConfigError: the evaluation has no such number.
        """
        value = numbers.get(self.metric)
        if not isinstance(value, int | float):
            known = tuple(name for name, each in numbers.items() if isinstance(each, int | float))
            raise ConfigError(
                f"{self.hook}: metric={self.metric} is not one of the evaluation's numbers: "
                f"{', '.join(known)}.{nearest(self.metric, known)}"
            )
        if not math.isfinite(value):
            return False
        gain = math.inf if self.value is None else self.value - value
        if self.mode == "max" and self.value is not None:
            gain = -gain
        if not (gain > self.min_delta or (gain == math.inf)):
            return False
        self.value, self.step = float(value), step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            SavedStateError: it is something else.
        """
        value, step = state.get("value"), state.get("step")
        if not (value is None or type(value) in (int, float)) or type(step) is not int:
            raise SavedStateError(f"the saved state of {self.hook} holds no best value.")
        self.value, self.step = None if value is None else float(value), step
