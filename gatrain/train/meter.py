"""Time and memory of steps, measured without making the host wait for the device."""

from __future__ import annotations

import resource
import sys
import time

import torch

Mark = torch.cuda.Event | float


class Meter:
    """Marks points in the device's work, and reads the peak of its memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """A point in time: an event in the GPU's queue, or the clock where the work is synchronous."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: Mark) -> bool:
        """Whether the device has come to a mark. Waits for nothing."""
        return isinstance(mark, float) or mark.query()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; waits for the later one."""
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)  # type: ignore[arg-type]
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def peak_memory_bytes(self) -> int:
        """Most memory in use so far: the GPU allocator's, or this process's resident memory on a CPU."""
        if self._on_gpu:
            return int(torch.cuda.max_memory_reserved(self._device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
