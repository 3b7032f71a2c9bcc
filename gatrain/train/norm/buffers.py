"""The buffers of a model as they were before a window, for a forward that is computed many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError


class KeptBuffers:
    """Copies of a model's buffers, and which of them were written to since. Nothing waits for the device."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_buffers())
        self._names, self._buffers = [name for name, _ in named], [buffer for _, buffer in named]
        self._first_values = [buffer.detach().clone() for buffer in self._buffers]
        self._kept = list(self._first_values)
        """What `restore` puts back."""
        self._versions = self._versions_now()
        self._of_first: list[int] = []
        self._compared: dict[int, Tensor] | None = None

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was written to since the window, or the last `advance`, began."""
        for place in self._written():
            self._buffers[place].copy_(self._kept[place])
            self._versions[place] = self._buffers[place]._version

    @torch.no_grad()
    def undo(self, nth: int) -> None:
        """`restore` before the ``nth`` micro-batch computes one part of a forward. It looks only for what the first
        one wrote: a hundred buffers would take longer to look through than the part."""
        if nth == 1:
            self._of_first = self._written()
        for place in self._of_first if nth else ():
            self._buffers[place].copy_(self._kept[place])
            self._versions[place] = self._buffers[place]._version

    @torch.no_grad()
    def advance(self, micro_batches: int) -> None:
        """After a part of all forwards: what is there now is what `restore` puts back from here on.

        Raises:
            ExactnessError: another micro-batch than the first has written to another buffer.
        """
        written = self._written()
        if micro_batches > 1 and (others := set(written).difference(self._of_first)):
            raise self._refusal(self._names[min(others)])
        for place in written:
            self._kept[place] = self._buffers[place].detach().clone()
            self._versions[place] = self._buffers[place]._version

    @torch.no_grad()
    def reset(self) -> None:
        """Everything as before the window."""
        written = set(self._written())
        for place, (buffer, first) in enumerate(zip(self._buffers, self._first_values, strict=True)):
            if place in written or self._kept[place] is not first:
                buffer.copy_(first)
                self._kept[place], self._versions[place] = first, buffer._version

    def advanced(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer that `advance` has moved on, with what it is now."""
        return [
            (buffer, kept)
            for buffer, kept, first in zip(self._buffers, self._kept, self._first_values, strict=True)
            if kept is not first
        ]

    def changed(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer that `restore` would put back, with a copy of what it is now."""
        return [(self._buffers[place], self._buffers[place].detach().clone()) for place in self._written()]

    @torch.no_grad()
    def put(self, values: list[tuple[Tensor, Tensor]]) -> None:
        """Fill buffers with what `changed` gave."""
        for buffer, value in values:
            buffer.copy_(value)

    def compare(self, k: int, model: nn.Module) -> None:
        """After the forward of the first and second micro-batch, each from the same buffers: what differs depends
        on samples, and no micro-batch knows what the whole window would make of it.

        Raises:
            ExactnessError: names one.
        """
        if k > 1:
            return
        now = {id(buffer): value for buffer, value in self.changed()}
        if k == 0:
            self._compared = now
            return
        for name, buffer in model.named_buffers():
            one, other = (self._compared or {}).get(id(buffer)), now.get(id(buffer))
            if (one is None) != (other is None) or (
                one is not None and other is not None and not torch.equal(one, other)
            ):
                raise self._refusal(name)

    def _refusal(self, name: str) -> ExactnessError:
        return ExactnessError(
            f"norm=exact: the model moves its buffer {name} by the samples of each micro-batch, and what the whole "
            "window would make of it is not known. Use norm=keep, or move it in a hook."
        )

    def _versions_now(self) -> list[int]:
        return [buffer._version for buffer in self._buffers]

    def _written(self) -> list[int]:
        """Places of the buffers that were written to."""
        now = self._versions_now()
        if now == self._versions:
            return []
        return [place for place, version in enumerate(now) if version != self._versions[place]]
