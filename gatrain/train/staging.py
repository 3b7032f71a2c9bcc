"""Host batches on their way to the device: on a stream of their own, ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gatrain.tasks.base import Batch
from gatrain.train.batches import move_to, moves_itself, tensors_of


class Staging:
    """Starts copies of host batches to the device.

    Called with a batch, it returns a function that gives the batch to the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Callable[[], Batch]:
        if self._copies is None or (not _is_flat(batch) and moves_itself(batch)):
            return lambda: move_to(batch, self._device)
        with torch.cuda.stream(self._copies):
            moved, tensors = self._moved(batch)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)

        def ready() -> Batch:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in tensors:
                tensor.record_stream(stream)  # its memory must not be reused for copies before then
            return moved

        return ready

    def _moved(self, batch: Batch) -> tuple[Batch, Iterable[Tensor]]:
        """The batch on the device, and its tensors there."""
        if not _is_flat(batch):
            moved = move_to(batch, self._device)
            return moved, list(tensors_of(moved))
        if isinstance(batch, Tensor):
            moved = batch.to(self._device, non_blocking=True)
            return moved, (moved,)
        if isinstance(batch, dict):
            named = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
            return named, named.values()
        parts = type(batch)(tensor.to(self._device, non_blocking=True) for tensor in batch)
        return parts, parts


def _is_flat(batch: Batch) -> bool:
    """Whether it is a tensor, or a plain tuple, list or dict of nothing but tensors: most batches are, and need no
    walk."""
    if type(batch) in (tuple, list):
        return all(isinstance(part, Tensor) for part in batch)
    if type(batch) is dict:
        return all(isinstance(part, Tensor) for part in batch.values())
    return isinstance(batch, Tensor)
