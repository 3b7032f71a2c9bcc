"""AdamA: Adam whose moments take each micro-batch's gradient at once, so that no gradient has to be kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gatrain.units import MIB

CHUNK_BYTES = 64 * MIB
"""Parameters that are stepped at once: the update needs as much memory again, and no more."""


class AdamA(torch.optim.Optimizer):
    """Adam accumulation: Zhang et al., "Adam Accumulation to Reduce Memory Footprints of both Activations and
    Gradients for Large-scale DNN Training", 2023 (arXiv:2305.19982), with AdamW's decoupled weight decay.

    With the gradients g_k of a window's micro-batches, which add up to that of the window::

        m = beta1 * m + (1 - beta1) * sum_k g_k
        v = beta2 * v + (1 - beta2) * sum_k g_k**2

    and the update of Adam. m is Adam's own; Adam's v has (sum_k g_k)**2 instead. Where N micro-gradients agree, v
    is as little as 1/N of that, and a step up to sqrt(N) times larger; where they are noise, both are about the
    same. With one micro-batch it is AdamW.

    In a loop of one's own: ``backward()``, then `fold` of each parameter (in a hook of
    ``register_post_accumulate_grad_hook``, say), for each micro-batch; then `step`.

    Args:
        params: parameters, or groups of them.
        lr: rate.
        betas: decay per step of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled, times the rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and eps >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: below 0, or a beta of 1"
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.holds_past = True
        """Whether `begin` starts from the moments so far. Of several ranks, whose moments are added, one does."""
        self.begun: dict[int, Tensor] = {}
        """Parameters whose moments have taken something since the last step, by their id."""
        self._group_of: dict[int, dict[str, Any]] = {}
        self._squares_before: dict[int, Tensor] = {}

    def make_state(self) -> None:
        """Make the moments of every parameter: zeros, one after the other."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    @torch.no_grad()
    def begin(self, parameter: Tensor) -> None:
        """Let a parameter's moments decay, once a step, before they take the first gradient."""
        if id(parameter) in self.begun:
            return
        if not self.begun:  # whoever loads a state puts other groups in their place
            self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        self.begun[id(parameter)] = parameter
        first, second = self._group_of[id(parameter)]["betas"]
        state = self._state_of(parameter)
        self._squares_before[id(parameter)] = state["exp_avg_sq"].sum(dtype=torch.float64).mul_(second)
        state["exp_avg"].mul_(first) if self.holds_past else state["exp_avg"].zero_()
        state["exp_avg_sq"].mul_(second) if self.holds_past else state["exp_avg_sq"].zero_()

    @torch.no_grad()
    def fold(self, parameter: Tensor) -> None:
        """Let a parameter's moments take its gradient, and free that."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        self.begin(parameter)
        first, second = self._group_of[id(parameter)]["betas"]
        state = self.state[parameter]
        state["exp_avg"].add_(gradient, alpha=1 - first)
        state["exp_avg_sq"].addcmul_(gradient, gradient, value=1 - second)

    def moments(self, parameter: Tensor) -> list[Tensor]:
        """The two moments of a parameter, for whoever adds them over ranks."""
        self.begin(parameter)
        return [self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]]

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Root of the sum of the squares of all that was taken since the last step: a scalar on the device.

        The norm of the window's gradient is not known. This one is not finite where a gradient was not.
        """
        squares: Tensor | None = None
        for parameter in self.begun.values():
            second = self._group_of[id(parameter)]["betas"][1]
            now = self.state[parameter]["exp_avg_sq"].sum(dtype=torch.float64)
            taken = (now - self._squares_before[id(parameter)]).div_(1 - second).clamp_(min=0)
            # a first moment that overflowed alone, or infinities that cancelled in it
            taken += self.state[parameter]["exp_avg"].sum() * 0
            squares = taken if squares is None else squares + taken
        if squares is None:
            device = next((p.device for group in self.param_groups for p in group["params"]), None)
            return torch.zeros((), device=device)
        return squares.sqrt().to(torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter whose moments have taken a gradient, or that has one now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.fold(parameter)
        for group in self.param_groups:
            for parameters, count in self._chunks(group):
                self._update(group, parameters, count)
        self.begun.clear()
        self._squares_before.clear()
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _chunks(self, group: dict[str, Any]) -> Iterator[tuple[list[Tensor], int]]:
        """Parameters that are stepped together: as often stepped, and not too many."""
        chunk: list[Tensor] = []
        size, count = 0, 0
        for parameter in group["params"]:
            if id(parameter) not in self.begun:
                continue
            self.state[parameter]["step"] += 1
            now = self.state[parameter]["step"]
            if chunk and (now != count or size >= CHUNK_BYTES):
                yield chunk, count
                chunk, size = [], 0
            chunk.append(parameter)
            count, size = now, size + parameter.numel() * parameter.element_size()
        if chunk:
            yield chunk, count

    def _update(self, group: dict[str, Any], parameters: list[Tensor], count: int) -> None:
        first, second = group["betas"]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        roots = torch._foreach_sqrt([self.state[parameter]["exp_avg_sq"] for parameter in parameters])
        torch._foreach_div_(roots, math.sqrt(1 - second**count))
        torch._foreach_add_(roots, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, roots, -group["lr"] / (1 - first**count))
