"""A knob: which kernel computes ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gatrain.train.knobs import Value

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class AttentionBackend:
    """Puts one backend of PyTorch's attention first; where it cannot compute a call, the others still may.

    Args:
        values: backends to measure, of ``cudnn``, ``flash``, ``efficient`` and ``math``.

    Raises:
        ValueError: there is no such backend.
    """

    name = "attention"
    words = "the kernel of scaled_dot_product_attention; results differ by rounding alone"

    def __init__(self, values: Sequence[str] = ("cudnn", "flash", "efficient")) -> None:
        unknown = [value for value in values if value not in _BACKENDS]
        if unknown:
            raise ValueError(f"values has {unknown[0]!r}, not one of {', '.join(_BACKENDS)}")
        self._values = tuple(values)

    def values(self, device: torch.device) -> Sequence[Value]:
        """Those asked for on a GPU; a CPU has one kernel."""
        return self._values if device.type == "cuda" else ()

    def apply(self, value: Value) -> AbstractContextManager[object]:
        first = _BACKENDS[str(value)]
        others = [backend for backend in _BACKENDS.values() if backend is not first]
        return sdpa_kernel([first, *others], set_priority=True)
