"""Ends a run whose evaluations no longer get better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import ConfigError, SavedStateError
from gatrain.hooks.best import Best
from gatrain.train.hook import Hook, HookRun


class EarlyStopping(Hook):
    """Ends the run, as completed, after ``patience`` evaluations in a row without a better value.

    Args:
        metric: the evaluation's number to watch: ``loss``, ``accuracy``, ``ema.loss``.
        patience: evaluations without a better value.
        min_delta: by how much a value must be better to count.
        mode: whether ``min`` or ``max`` is better.
    """

    needs_verdict = False

    def __init__(
        self, metric: str = "loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if type(patience) is not int or patience < 1:
            raise ConfigError(f"early_stopping: patience={patience} is not a whole number of at least 1.")
        self._best, self._patience, self._waited = (
            Best("early_stopping", metric, mode, min_delta),
            patience,
            0,
        )

    def check(self, config: RunConfig) -> None:
        self._best.check(config)

    def start(self, run: HookRun) -> None:
        if not run.evaluates:
            raise ConfigError("early_stopping: the task has no held-out data (eval_data) to watch.")
        self._stop = run.stop

    def evaluated(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._waited = 0 if self._best.improves(step, numbers) else self._waited + 1
        self._stop_if_due()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best.state_dict(), "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best, waited = state.get("best"), state.get("waited")
        if not isinstance(best, dict) or type(waited) is not int:
            raise SavedStateError("the saved state of early_stopping has other keys than best and waited.")
        self._best.load_state_dict(best)
        self._waited = waited
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        if self._waited >= self._patience:
            value = "never finite" if self._best.value is None else f"{self._best.value:.6g}"
            self._stop(
                f"{self._best.metric} has not been better than {value} (step {self._best.step}) for "
                f"{self._waited} evaluations"
            )
