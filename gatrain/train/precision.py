"""Mixed precision: autocast over fp32 parameters, so that gradients accumulate in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

LOWEST_SCALE = 2.0**-16
"""fp16 loss scale below which an overflow is no longer put down to the scale."""


class LossScaler(torch.amp.GradScaler):
    """The loss scale of fp16: one for a whole window, the same on every rank."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        # made now: a rank without samples in the first window would have none
        self._one = torch.ones((), device=device)
        self.scale(self._one)

    def now(self) -> torch.Tensor:
        """The scale in use: a scalar on the device, for reading later."""
        return self.scale(self._one)

    def set_to(self, scale: float) -> None:
        """Go on with this scale, and count anew the updates after which it grows."""
        self.load_state_dict({**self.state_dict(), "scale": scale, "_growth_tracker": 0})


def autocast_for(
    precision: str, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Make a function that gives the context of a forward pass in ``precision``."""
    if precision not in _AUTOCAST:
        return contextlib.nullcontext
    dtype = _AUTOCAST[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def scaler_for(precision: str, device: torch.device) -> LossScaler | None:
    """The loss scaler that fp16 needs; None otherwise."""
    return LossScaler(device) if precision == "fp16" else None


def forbid_tf32(precision: str) -> None:
    """Make ``fp32`` mean fp32 on a GPU, for matrix products and convolutions alike."""
    if precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
