"""How much is loaded ahead: as much as was asked for, as far as main memory and /dev/shm have room for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gatrain import units
from gatrain.errors import DoesNotFitError
from gatrain.main_memory import available_memory, free_shared_memory

PREFETCH = 4
"""Micro-batches that each loader process may have ready."""
SHARE = 0.5
"""Part of what is free that loading may take: the model's own work needs room as well."""


@dataclass(frozen=True)
class FreeMemory:
    """What one rank may count on, in bytes. ``shared_bytes`` is None where nothing bounds it."""

    main_bytes: int
    shared_bytes: int | None

    @classmethod
    def of_this_rank(cls) -> FreeMemory:
        """What is free on this node, divided by its ranks."""
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        shared = free_shared_memory()
        return cls(available_memory() // ranks, None if shared is None else shared // ranks)


@dataclass(frozen=True)
class ReadAhead:
    """What may be loaded before it is needed."""

    workers: int
    """Loader processes."""
    prefetch: int
    """Micro-batches each of them may have ready."""
    next_window: bool
    """Whether the next window may be in memory beside the one being computed."""
    notice: str | None = None
    """Says what was cut, and why."""


def bounded(workers: int, micro_bytes: int, window_bytes: int, free: FreeMemory) -> ReadAhead:
    """What of ``workers`` processes with `PREFETCH` micro-batches each has room.

    Args:
        micro_bytes: of one micro-batch on the host.
        window_bytes: of this rank's part of a window, which is loaded whole before its first forward.
        free: before the first window is loaded.

    Raises:
        DoesNotFitError: not even one window has room, or one micro-batch on its way from a process.
    """
    if window_bytes > free.main_bytes:
        raise DoesNotFitError(
            f"this rank's part of a window is {units.size(window_bytes)}, and {units.size(free.main_bytes)} of "
            "main memory are free for it. It is loaded whole before its first forward, since the weights of all "
            "its samples must be known. Use a smaller batch.effective, more nodes, or smaller samples."
        )
    room = SHARE * free.main_bytes
    next_window = 2 * window_bytes <= room
    left = max(0.0, room - (2 if next_window else 1) * window_bytes)
    if free.shared_bytes is not None:
        left = min(left, SHARE * free.shared_bytes)
    if workers and free.shared_bytes is not None and 2 * micro_bytes > free.shared_bytes:
        raise DoesNotFitError(
            f"a micro-batch of {units.size(micro_bytes)} does not fit into /dev/shm, through which loader "
            f"processes pass it: {units.size(free.shared_bytes)} are free. Use train.data_workers=0, a smaller "
            "batch.micro, or give the container more shared memory (docker run --shm-size=16g)."
        )
    most, asked = max(1, int(left // max(micro_bytes, 1))), workers * PREFETCH
    kept = min(workers, most)
    prefetch = min(PREFETCH, most // kept) if kept else PREFETCH
    said = []
    if (kept, prefetch) != (workers, PREFETCH):
        said.append(
            f"train.data_workers={workers} would hold {units.size(asked * micro_bytes)} ahead "
            f"({asked} micro-batches of {units.size(micro_bytes)}), and {units.size(left)} have room in main "
            f"memory and /dev/shm: {kept} process{'es' * (kept > 1)} with {prefetch} each read ahead"
        )
    if not next_window:
        said.append(f"a window of {units.size(window_bytes)} is loaded only when the one before it is done")
    return ReadAhead(kept, prefetch, next_window, "; ".join(said) + "." if said else None)


def held_bytes(workers: int, micro_bytes: float, window_bytes: float) -> float:
    """Main memory of one rank that loading holds at most, as asked for: two windows and what processes have."""
    return 2 * window_bytes + workers * PREFETCH * micro_bytes
