"""Takes updates back: parameters and optimizer state as they were before a window, kept beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Undo:
    """What an optimizer changes in its parameters, its state and its groups, kept and put back.

    Costs the memory of the parameters and the state once more, and a copy of both at each `keep`. Nothing waits for
    the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._places: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._state: dict[nn.Parameter, dict[str, Any]] = {}
        self._options: list[dict[str, Any]] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remember everything as it is now."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        state = self._optimizer.state
        self._state = {p: dict(state[p]) for p in parameters if p in state}
        self._options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        values: Iterable[Any] = (value for each in self._state.values() for value in each.values())
        self._places = [*parameters, *(value for value in values if isinstance(value, Tensor))]
        if [_form(each) for each in self._copies] != [_form(each) for each in self._places]:
            self._copies = [torch.empty_like(place) for place in self._places]
        torch._foreach_copy_(self._copies, self._places)

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything as it was at the last `keep`."""
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(options, params=parameters)
            for parameter in parameters:
                self._optimizer.state.pop(parameter, None)
                if parameter in self._state:
                    self._optimizer.state[parameter] = dict(self._state[parameter])
        torch._foreach_copy_(self._places, self._copies)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
