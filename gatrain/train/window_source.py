"""The seam between data and training: what gives the windows from a stored position, by number or in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gatrain.tasks.base import Task
from gatrain.train.loader import WindowLoader
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.ranks import Ranks
from gatrain.train.stream_loader import StreamLoader, StreamWindows
from gatrain.train.windows import Cut, WindowSchedule


def open_windows(
    task: Task,
    schedule: WindowSchedule,
    ranks: Ranks,
    *,
    micro_batch: int,
    shares: Sequence[int] | None,
    start: int,
    stop: int,
    position: dict[str, Any] | None,
    workers: int = 0,
    pin_memory: bool = False,
    cuts: Sequence[Cut] = (),
) -> Iterable[LoadedWindow]:
    """This rank's part of the windows ``start`` to ``stop`` - 1.

    Args:
        shares: the plan's samples of each rank in a full window; None means that all ranks are equal.
        position: of a stream, where window ``start`` begins; None is its beginning. Data that is read by number
            needs none: window ``n`` follows from ``n``.
        workers: loader processes.
        cuts: in place of ``micro_batch`` and ``shares``, one for each stage of the effective batch.
    """
    if isinstance(schedule, StreamWindows):
        return StreamLoader(
            task, schedule, ranks, micro_batch, shares, start, stop, position, workers, pin_memory, cuts
        )
    return WindowLoader(
        task,
        schedule,
        ranks,
        micro_batch=micro_batch,
        shares=shares,
        start=start,
        stop=stop,
        workers=workers,
        pin_memory=pin_memory,
        cuts=cuts,
    )
