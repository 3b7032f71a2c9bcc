"""Muon for matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_EPS = 1e-7
"""Added to a matrix's norm before the iteration; the default of `torch.optim.Muon`."""


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) and `torch.optim.AdamW`.

    Muon is for matrices inside a network; its authors leave embeddings, the output layer, gains and biases to
    AdamW. Both step here, over groups with ``use_muon`` true or false; one without it goes by the dimensions.
    With ``adjust_lr_fn="match_rms_adamw"`` (Liu et al. 2025, arXiv:2502.16982) updates are as large as AdamW's, so
    that one rate and one weight decay serve both; ``original`` wants a rate of its own for the matrices.

    Args:
        params: parameters, or groups of them.
        lr: rate of both.
        weight_decay: of both, decoupled.
        momentum: of Muon, with ``nesterov`` and ``ns_steps`` Newton-Schulz iterations.
        adjust_lr_fn: how Muon's rate follows from a matrix's shape.
        betas: of AdamW, with ``eps``.
        fused: AdamW's fused kernels.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        self._of_muon = {
            "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "eps": _EPS,
        }  # fmt: skip
        self._of_adamw = {"betas": tuple(betas), "eps": eps, "fused": fused}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "use_muon": None})
        given, self.param_groups = self.param_groups, []
        for group in given:
            self.param_groups += self._parts(group)
        muon = [group for group in self.param_groups if group["use_muon"]]
        adamw = [group for group in self.param_groups if not group["use_muon"]]
        # the groups are the same dicts and the state is the same mapping: whoever sets a rate or reads the state
        # of this optimizer sets and reads that of the two inside
        self._muon = torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay) if muon else None
        self._adamw = torch.optim.AdamW(adamw, lr=lr, weight_decay=weight_decay) if adamw else None

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        parts: dict[bool, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            by_muon = parameter.dim() == 2 if group["use_muon"] is None else bool(group["use_muon"])
            parts.setdefault(by_muon, []).append(parameter)
        rest = {
            key: value for key, value in group.items() if key not in ("params", "use_muon", "param_names")
        }
        return [
            {**(self._of_muon if by_muon else self._of_adamw), **rest, "params": params, "use_muon": by_muon}
            for by_muon, params in parts.items()
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        both: list[tuple[Any, bool]] = [(self._muon, True), (self._adamw, False)]
        for inner, by_muon in both:
            if inner is not None:
                # `load_state_dict` puts others in their place
                inner.state = self.state
                inner.param_groups = [group for group in self.param_groups if group["use_muon"] is by_muon]
                inner.step()
        return loss
