"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """EvoLved Sign Momentum: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, Algorithm 2
    (arXiv:2302.06675).

    With gradient g, momentum m (zero at first) and parameter p::

        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (sign(c) + weight_decay * p)
        m = beta2 * m + (1 - beta2) * g

    One tensor of state for each parameter. The paper's rates are 3 to 10 times smaller than AdamW's, with as many
    times the weight decay.

    Args:
        params: parameters, or groups of them.
        lr: rate.
        betas: of the update and of the momentum.
        weight_decay: decoupled, times the rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr}, betas={betas}, weight_decay={weight_decay}: below 0, or a beta of 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters, [p.grad for p in parameters])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        first, second = group["betas"]
        updates = torch._foreach_mul(momenta, first)
        torch._foreach_add_(updates, gradients, alpha=1 - first)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        torch._foreach_mul_(momenta, second)
        torch._foreach_add_(momenta, gradients, alpha=1 - second)
