"""Keeps the state with the best evaluation, beside the newest ones that ``save.keep`` keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.hooks.best import Best
from gatrain.train.hook import Hook, HookRun


class KeepBest(Hook):
    """Keeps the whole state of the step with the best value in ``kept/best`` of the run folder.

    ``gatrain resume`` goes on from the newest state in ``saved`` all the same. To go on from the best one instead,
    move it to ``saved`` in the place of the later ones.

    Args:
        metric: the evaluation's number to watch: ``loss``, ``accuracy``, ``ema.loss``.
        mode: whether ``min`` or ``max`` is better.
        folder: its name below ``kept``.
    """

    needs_verdict = False

    def __init__(self, metric: str = "loss", mode: str = "min", folder: str = "best") -> None:
        self._best, self._folder = Best("keep_best", metric, mode), folder

    def check(self, config: RunConfig) -> None:
        self._best.check(config)

    def start(self, run: HookRun) -> None:
        if not run.evaluates:
            raise ConfigError("keep_best: the task has no held-out data (eval_data) to watch.")
        self._run = run

    def evaluated(self, step: int, numbers: Mapping[str, Any]) -> None:
        if self._best.improves(step, numbers):
            self._run.keep(self._folder)

    def end(self, step: int, completed: bool) -> None:
        if self._best.value is not None:
            state = self._run.run_dir / "kept" / self._folder / f"step_{self._best.step:08d}"
            self._run.notice(
                f"best {self._best.metric} {self._best.value:.6g} at step {self._best.step}: its state is kept in "
                f"{state}"
            )

    def state_dict(self) -> dict[str, Any]:
        return self._best.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best.load_state_dict(state)
