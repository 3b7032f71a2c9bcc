"""The gradient noise scale: measured in every step from norms that it has anyway, and what it says of the batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from gatrain.errors import ConfigError, SavedStateError
from gatrain.hooks.noise_estimate import NoiseEstimate, one_step
from gatrain.noise_advice import batch_advice
from gatrain.train.hook import Hook, HookRun
from gatrain.train.records import StepRecord


class NoiseScale(Hook):
    """Measures tr(S) / |G|**2 of the gradient G of one sample's loss with covariance S, in samples.

    Compared are parts of a window with all of it: each rank's share before the reduction, or on one rank (and with
    ``sync=overlap``) its first micro-batch. Costs one norm of the gradient a step, and no wait for the device.
    Where a window has one part only (one rank with K = 1) nothing can be measured, and the run says so.
    Metrics: ``noise_scale`` with its interval of 95 %, ``noise_scale_low`` and ``noise_scale_high``.

    Args:
        decay: of the averages over steps, from 0.5 to below 1: about (1 + decay) / (1 - decay) steps count.
        stop_after: end the run, as completed, after this many measured steps.
    """

    needs_verdict = False
    needs_part_norms = True

    def __init__(self, decay: float = 0.99, stop_after: int | None = None) -> None:
        if not 0.5 <= decay < 1:
            raise ConfigError(f"noise_scale: decay={decay} is not from 0.5 to below 1.")
        if stop_after is not None and (type(stop_after) is not int or stop_after < 1):
            raise ConfigError(f"noise_scale: stop_after={stop_after} is not a whole number of at least 1.")
        self._estimate, self._stop_after = NoiseEstimate(decay), stop_after
        self._unmeasured = 0
        """Steps without two parts to compare."""
        self._recent: deque[float] = deque(maxlen=2)
        """Samples of the last windows: of two, as the last of an epoch may be short."""

    def start(self, run: HookRun) -> None:
        self._run = run

    def measured(self, record: StepRecord) -> Mapping[str, float]:
        if record.skipped is not None:
            return {}
        found = one_step(record.parts, record.grad_norm**2) if record.parts else None
        if found is None:
            self._unmeasured += 1
            if self._unmeasured == 1 and not self._estimate.steps:
                self._run.notice(f"noise_scale: nothing was measured in step {record.step}. {self._remedy()}")
            return {}
        self._recent.append(record.parts["samples"])
        self._estimate.add(*found, record.parts["total"], record.parts["samples"])
        if self._stop_after is not None and self._estimate.steps >= self._stop_after:
            self._run.stop(f"noise_scale has measured {self._estimate.steps} steps")
        now = self._estimate.now()
        if now is None:
            return {}
        values = {"noise_scale": now.value, "noise_scale_low": now.low, "noise_scale_high": now.high}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def findings(self) -> dict[str, str]:
        now = self._estimate.now()
        if now is None:
            why = f"measured in {self._estimate.steps} steps, too few to tell."
            return {"noise scale": why if self._estimate.steps else f"not measured. {self._remedy()}"}
        return {
            "noise scale": now.text,
            "batch advice": batch_advice(now.value, now.low, now.high, self._batch()),
        }

    def _batch(self) -> int:
        """The effective batch in samples: the run's own, or that of the last steps where it is far from it, as with
        stages and where a batch counts tokens."""
        size, recent = self._run.effective_batch, int(max(self._recent, default=0))
        return recent if recent and not 0.8 * size <= recent <= size else size

    def state_dict(self) -> dict[str, Any]:
        return {"estimate": self._estimate.state_dict(), "unmeasured": self._unmeasured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            if type(state.get("unmeasured")) is not int or not isinstance(state.get("estimate"), dict):
                raise ValueError("it has other keys than estimate and unmeasured")
            self._estimate.load_state_dict(state["estimate"])
        except ValueError as error:
            raise SavedStateError(f"the saved state of noise_scale is not its own: {error}.") from error
        self._unmeasured = state["unmeasured"]

    def _remedy(self) -> str:
        size = self._run.effective_batch
        if self._run.world_size > 1:
            return (
                "A window is compared with parts of it that several ranks, or several micro-batches of one rank, "
                "hold; and all loss terms must count the same weights."
            )
        if size == 1:
            return "A window of one sample has no parts. Measure with batch.effective=2 or more."
        return (
            "A window is compared with a part of it, and one rank with one micro-batch has none: "
            f"batch.micro={(size + 1) // 2} gives it two. With several loss terms all must count the same weights."
        )
