"""The buffers of a model as they were before a window, for a forward that is computed many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError


class KeptBuffers:
    """Copies of a model's buffers, and which of them were written to since. Nothing waits for the device."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._versions = [buffer._version for buffer, _ in self._kept]
        self._first: dict[int, Tensor] | None = None

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was written to."""
        for place, (buffer, copy) in enumerate(self._kept):
            if buffer._version != self._versions[place]:
                buffer.copy_(copy)
                self._versions[place] = buffer._version

    def changed(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer that was written to, with a copy of what it is now."""
        return [
            (buffer, buffer.detach().clone())
            for (buffer, _), version in zip(self._kept, self._versions, strict=True)
            if buffer._version != version
        ]

    @torch.no_grad()
    def put(self, values: list[tuple[Tensor, Tensor]]) -> None:
        """Fill buffers with what `changed` gave."""
        for buffer, value in values:
            buffer.copy_(value)

    def compare(self, k: int, model: nn.Module) -> None:
        """After the forward of the first and second micro-batch, each from the buffers before the window: what
        differs depends on samples, and no micro-batch knows what the whole window would make of it.

        Raises:
            ExactnessError: names one.
        """
        if k > 1:
            return
        now = {id(buffer): value for buffer, value in self.changed()}
        if k == 0:
            self._first = now
            return
        for name, buffer in model.named_buffers():
            one, other = (self._first or {}).get(id(buffer)), now.get(id(buffer))
            if (one is None) != (other is None) or (
                one is not None and other is not None and not torch.equal(one, other)
            ):
                raise ExactnessError(
                    f"norm=exact: the model moves its buffer {name} by the samples of each micro-batch, and what "
                    "the whole window would make of it is not known. Use norm=keep, or move it in a hook."
                )
