"""Applies the rule for a change of the effective batch (`gatrain.batch_rule`) to an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatrain.batch_rule import OF_ADAM, Scaled, in_words, scaled
from gatrain.errors import ConfigError, SavedStateError

PART = "batch_rule"
"""Of a saved state: the betas that its moments were accumulated with."""
_FIRST, _SECOND = ("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")
"""Adam's moments, by the beta that they decay with."""


class BatchScaling:
    """The rate's factor, betas and eps at the effective batch of the window in hand.

    Args:
        rule: one of `gatrain.batch_rule.RULES`.
        base: the effective batch that the configured values are for.
        optimizer: as configured; it keeps its groups.
        lr: configured peak rate, for messages.

    Raises:
        ConfigError: the rule speaks of Adam's betas, and the optimizer is another.
    """

    def __init__(self, rule: str, base: int, optimizer: torch.optim.Optimizer, lr: float) -> None:
        self._rule, self._base, self._optimizer, self._lr = rule, base, optimizer, lr
        self._is_adam = rule in OF_ADAM
        if self._is_adam and not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ConfigError(
                f"batch.rule={rule} speaks of Adam's betas, and the optimizer is a {type(optimizer).__name__}. Use "
                "batch.rule=linear, or set optimizer.lr for the effective batch and leave batch.rule out."
            )
        self._begun = [self._values(group) for group in optimizer.param_groups]
        self.lr_factor = 1.0

    def _values(self, group: dict[str, Any]) -> Scaled:
        if not self._is_adam:
            return Scaled(1.0)
        first, second = map(float, group["betas"])
        return Scaled(1.0, (first, second), float(group["eps"]))

    def set_to(self, effective: int) -> None:
        """Set the optimizer to an effective batch; where it is set to it already nothing changes.

        Raises:
            ConfigError: the rule has no value there.
        """
        for group, begun in zip(self._optimizer.param_groups, self._begun, strict=True):
            now = scaled(self._rule, effective / self._base, begun.betas, begun.eps)
            self.lr_factor = now.lr_factor
            if now.betas is None:
                continue
            before = tuple(group["betas"])
            if before != now.betas:
                self._keep_means(group, before, now.betas)
                group["betas"] = now.betas
            group["eps"] = now.eps

    def words(self, effective: int) -> str:
        """What `set_to` does there, with numbers of the first group."""
        begun = self._begun[0]
        now = scaled(self._rule, effective / self._base, begun.betas, begun.eps)
        return in_words(self._rule, self._base, effective, self._lr, begun, now)

    @torch.no_grad()
    def _keep_means(self, group: dict[str, Any], before: Any, now: tuple[float, float]) -> None:
        """Let both bias-corrected means be the same after the change.

        After t steps Adam divides its sums by ``1 - beta**t``. With another beta they would be divided by what they
        do not add up to (0.999 to 0.996 after 100 steps: v 3.5 times too small), so they are scaled to it once.
        """
        for parameter in group["params"]:
            state = self._optimizer.state.get(parameter)
            if not state or "step" not in state:
                continue
            for names, old, new in zip((_FIRST, _SECOND), before, now, strict=True):
                if old == new:
                    continue
                ratio = _corrected(new, state["step"]) / _corrected(old, state["step"])
                for name in names:
                    if name in state:
                        state[name].mul_(ratio.to(state[name]))

    def parts(self) -> dict[str, Any]:
        """For a saved state: a change is made once, wherever a run goes on."""
        if not self._is_adam:
            return {}
        return {PART: {"betas": [list(group["betas"]) for group in self._optimizer.param_groups]}}

    def load(self, parts: dict[str, Any]) -> None:
        """Take this part out of those of a saved state; one without it was trained without such a rule.

        Raises:
            SavedStateError: it is of other groups.
        """
        part = parts.pop(PART, None)
        if not self._is_adam or part is None:
            return
        betas = part.get("betas") if isinstance(part, dict) else None
        groups = self._optimizer.param_groups
        if not isinstance(betas, list) or len(betas) != len(groups) or not all(map(_is_pair, betas)):
            raise SavedStateError("the saved state's betas of batch.rule are of other groups of parameters.")
        for group, (first, second) in zip(groups, betas, strict=True):
            group["betas"] = (first, second)


def _corrected(beta: float, step: Any) -> Tensor:
    """``1 - beta**t``, float64, on the host; 1 before the first step."""
    steps = torch.as_tensor(
        step, dtype=torch.float64, device="cpu"
    )  # waits for a fused optimizer's, at a change
    return torch.where(steps > 0, 1 - torch.tensor(beta, dtype=torch.float64) ** steps, 1.0)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(each, float) and 0 <= each < 1 for each in value)
    )
