"""Notices when somebody else changes gradients or parameters between two micro-steps of a window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Watch:
    """Remembers the gradients and parameters as one micro-step left them.

    By the tensors' version counters, which every change in place raises: nothing is read, nothing waits for
    the device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._noted: list[tuple[int, int, int]] | None = None

    def note(self) -> None:
        """Remember them as they are now."""
        self._noted = self._now()

    def forget(self) -> None:
        """A window ends: whatever happens until the next `note` is as it should be."""
        self._noted = None

    def sees_a_change(self) -> bool:
        """Whether anything changed since the last `note`."""
        return self._noted is not None and self._noted != self._now()

    def _now(self) -> list[tuple[int, int, int]]:
        return [
            (0, 0, p._version) if p.grad is None else (id(p.grad), p.grad._version, p._version)
            for p in self._parameters
        ]
