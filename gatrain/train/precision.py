"""Mixed precision: autocast over fp32 parameters, so that gradients accumulate in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(
    precision: str, device: torch.device
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Make a function that gives the context of a forward pass in ``precision``."""
    if precision not in _AUTOCAST:
        return contextlib.nullcontext
    dtype = _AUTOCAST[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def scaler_for(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that fp16 needs; None otherwise. One decision per window: skip, grow, or step."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


def forbid_tf32(precision: str) -> None:
    """Make ``fp32`` mean fp32 on a GPU, for matrix products and convolutions alike."""
    if precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
