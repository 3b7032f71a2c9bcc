"""Host batches on their way to the device: on a stream of their own, ahead of their use."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
        if self._copies is None or moves_itself(batch):
            return lambda: move_to(batch, self._device)
        with torch.cuda.stream(self._copies):
            moved = move_to(batch, self._device)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)

        def ready() -> Batch:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in tensors_of(moved):
                tensor.record_stream(stream)  # its memory must not be reused for copies before then
            return moved

        return ready
