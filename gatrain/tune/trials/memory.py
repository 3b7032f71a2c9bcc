"""What a trial may use and did use of memory: by torch's allocator on a GPU, the kernel's books on a CPU."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path
from typing import Protocol

import torch

from gatrain.main_memory import available_memory
from gatrain.rank import Rank

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(Protocol):
    """Peak memory of this process, in bytes, against what it may use."""

    budget_bytes: int

    def reset_peak(self) -> None:
        """Start a new peak."""

    def peak(self) -> int:
        """Largest use since `reset_peak`."""

    def base(self) -> int:
        """Use now."""

    def fragmentation(self) -> int:
        """What of the peak no tensor ever filled: cut up by the allocator."""

    def free_bytes(self) -> int:
        """All that this process could take, if it left no margin."""

    def release(self) -> None:
        """Give unused memory back, so that the next size starts from the same place."""


def memory_of(rank: Rank, fraction: float) -> Memory:
    """The books for this rank's device. Call it before the model is on the device."""
    if rank.device.type == "cuda":
        return GpuMemory(rank.device, fraction)
    return HostMemory(fraction, rank.local_world_size)


class GpuMemory:
    """A GPU: the budget is ``fraction`` of what was free at the start, so memory of others is left alone.

    The allocator is capped at the budget: it then frees its cache and retries, or raises OutOfMemoryError,
    before it takes what was not meant for it. What lies outside the allocator (NCCL's buffers, kernels
    loaded on first use) is seen as the rest of the drop in free memory and counted with the peak.
    """

    def __init__(self, device: torch.device, fraction: float) -> None:
        self._device = device
        free, total = torch.cuda.mem_get_info(device)
        self._free_at_start = free
        self.budget_bytes = int(free * fraction)
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget_bytes / total), device)

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_reserved(self._device)) + self._outside()

    def base(self) -> int:
        return int(torch.cuda.memory_reserved(self._device)) + self._outside()

    def fragmentation(self) -> int:
        reserved = torch.cuda.max_memory_reserved(self._device)
        return max(0, int(reserved - torch.cuda.max_memory_allocated(self._device)))

    def free_bytes(self) -> int:
        return self._free_at_start

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # after a device error nothing can be released
            torch.cuda.empty_cache()

    def _outside(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(0, self._free_at_start - free - int(torch.cuda.memory_reserved(self._device)))


class HostMemory:
    """Main memory: the budget is what is used now plus this rank's part of ``fraction`` of what is free."""

    def __init__(self, fraction: float, local_ranks: int) -> None:
        self.budget_bytes = self.base() + int(available_memory() * fraction / max(local_ranks, 1))

    def reset_peak(self) -> None:
        """Reset the kernel's high-water mark (Linux 4.0 and later; elsewhere the peak is the process's)."""
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")

    def peak(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return _status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)

    def base(self) -> int:
        return _status("VmRSS") or self.peak()

    def fragmentation(self) -> int:
        return 0  # main memory comes in pages

    def free_bytes(self) -> int:
        return self.budget_bytes

    def release(self) -> None:
        pass


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return int(match.group(1)) * 1024 if match else None
    return None


def predicted_peak(points: list[tuple[int, int]], base: int, size: int) -> float:
    """Peak bytes at ``size`` on the line through the last two measured (size, peak) points.

    With one point the line starts at ``base``, the use before the first size. A line that falls is taken as
    level.
    """
    if not points:
        return base
    (low, low_bytes), (high, high_bytes) = ([(0, base), *points])[-2:]
    slope = max(0.0, (high_bytes - low_bytes) / (high - low))
    return max(high_bytes + slope * (size - high), high_bytes)
