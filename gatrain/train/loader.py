"""From the window schedule to this rank's micro-batches on the host, at least one window ahead.

A window is loaded whole before its first forward, since its weights must be known by then.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gatrain import batch, offspring
from gatrain.causes import told
from gatrain.errors import DataError, GatrainError
from gatrain.tasks.base import Samples, Task, is_deterministic
from gatrain.train import samples
from gatrain.train.batches import bytes_of, map_tensors, pinned
from gatrain.train.micro_batches import LoadedWindow, MicroBatch, counts_of
from gatrain.train.ranks import Ranks
from gatrain.train.read_ahead import PREFETCH, FreeMemory, ReadAhead, bounded
from gatrain.train.samples import Key
from gatrain.train.seeding import MICRO_STEP
from gatrain.train.windows import Cut, Window, WindowSchedule, digest

DRAWS_UNDECLARED = (
    "the data or its collate function is declared deterministic but draws random numbers: it is read with seeds, "
    "and not ahead in a thread. Leave `deterministic = True` (or `deterministic_collate = True`) out."
)


QUICK_S = 2e-3
"""A window that is read in less is read between two steps, while the device works: a thread would take turns with
the step's own Python, which costs a small model more than the reading (``tests/benchmarks/small_model.py``)."""
SLOW_IN_ROW = 2
"""Windows that took longer, one after the other, before a thread reads the rest."""


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a loader process, which would wrap it in a stack trace."""

    kind: type[GatrainError]
    message: str


class _MicroBatches(Dataset[Any]):
    """Loads one micro-batch of samples at a time; runs in loader processes."""

    def __init__(self, task: Task, data: Samples, seed: int) -> None:
        self._task = task
        self._data = data
        self._seed = seed

    def __getitem__(self, key: Key) -> Any:
        raise NotImplementedError("micro-batches are read whole, through __getitems__")

    def __getitems__(self, keys: list[Key]) -> MicroBatch | Failure:
        try:
            return samples.load(self._task, self._data, keys, self._seed)
        except GatrainError as error:
            return Failure(type(error), str(error))
        except (SystemExit, KeyboardInterrupt) as error:  # else the process would end without a word
            return Failure(DataError, f"cannot load samples: {told(error)}")


class WindowLoader:
    """Iterates over the loaded windows ``start`` to ``stop`` - 1 of this rank.

    ``shares`` are the plan's samples of each rank in a full window; None means that all ranks are equal. ``cuts``
    take their place and that of ``micro_batch`` where the effective batch has stages: one for each stage.

    With ``workers`` processes the next window is read while the current one is computed. Without, a thread
    reads ahead where a window takes long to read and nothing in it can draw from the random generators, which
    belong to the whole process and to the model's forward: declared data and collate functions, looked at during
    the first window.

    Raises:
        GatrainError: while iterating, when samples cannot be read or weighed.
    """

    def __init__(
        self,
        task: Task,
        schedule: WindowSchedule,
        ranks: Ranks,
        *,
        micro_batch: int,
        shares: Sequence[int] | None = None,
        start: int,
        stop: int,
        workers: int = 0,
        pin_memory: bool = False,
        cuts: Sequence[Cut] = (),
    ) -> None:
        self._task = task
        self._schedule = schedule
        self._ranks = ranks
        self._cuts = cuts or [Cut(micro_batch, shares)]
        self._range = range(start, stop)
        self._workers = workers
        self._pin_memory = pin_memory
        self._draws_nothing = False
        self._told: set[str] = set()
        self._ahead = ReadAhead(workers, PREFETCH, next_window=True)
        self._is_sized = False

    def __iter__(self) -> Iterator[LoadedWindow]:
        windows = self._windows()
        if self._workers:
            yield from in_background(windows, lambda: self._ahead.next_window)
            return
        self._draws_nothing = False
        for first in itertools.islice(windows, 1):  # read here, so that what draws numbers is noticed
            yield first
            declared = is_deterministic(self._task.train_data) and self._task.collates_deterministically
            self._draws_nothing = declared and not any(m.undeclared_draws for m in first.micro_batches)
        if self._draws_nothing and self._ahead.next_window:
            yield from _while_quick(windows)
            yield from in_background(windows)
        else:
            yield from windows

    def _cut(self, window: Window) -> tuple[int, list[list[Key]]]:
        """This rank's part of a window: the place of its first sample, and (epoch, sample) by micro-batch."""
        stage = self._schedule.stage_at(window.index) if len(self._cuts) > 1 else 0
        micro_batch, shares = self._cuts[stage]
        first, ids = window.slice_of(self._ranks.rank, self._ranks.world_size, shares)
        sizes = batch.micro_batch_sizes(len(ids), micro_batch)
        keys = iter(window.keys(first, len(ids)))
        return first, [list(itertools.islice(keys, size)) for size in sizes]

    def _micro_batches(self, keys: Iterator[list[Key]]) -> Iterator[MicroBatch]:
        data, seed = self._task.train_data, self._schedule.seed
        if not self._workers:
            for each in keys:
                micro = samples.load(self._task, data, each, seed, trusted=self._draws_nothing)
                self._look_at_size(micro)
                yield micro
            return
        # the first one tells how many may be on their way at once; in a process too, as data may hold open files
        for micro in _from_processes(
            self._task, data, itertools.islice(keys, 1), seed, ReadAhead(1, 1, True)
        ):
            self._look_at_size(micro)
            yield micro
        yield from _from_processes(self._task, data, keys, seed, self._ahead)

    def _look_at_size(self, micro: MicroBatch) -> None:
        if self._is_sized or micro.is_empty:
            return
        self._is_sized = True
        size = bytes_of(micro.batch)
        _, cut = self._cut(self._schedule.window(self._range.start))
        share = sum(map(len, cut))
        self._ahead = bounded(
            self._workers, size, size * share // max(1, len(micro.keys)), FreeMemory.of_this_rank()
        )

    def _windows(self) -> Iterator[LoadedWindow]:
        # read ahead by `keys`, and once more when their samples are there
        ahead, windows = itertools.tee(
            (window, *self._cut(window)) for window in map(self._schedule.window, self._range)
        )
        source = self._micro_batches(keys for _, _, cut in ahead for keys in cut)
        for window, first, cut in windows:
            starts = itertools.accumulate(map(len, cut), initial=first)
            loaded = [
                dataclasses.replace(micro, position=position)
                for micro, position in zip(itertools.islice(source, len(cut)), starts, strict=False)
            ]
            read = np.array([sample for micro in loaded for _, sample in micro.keys], dtype=np.int64)
            yield LoadedWindow(
                [self._settled(micro) for micro in loaded if not micro.is_empty],
                seed=(self._schedule.seed, MICRO_STEP, window.index),
                counts=counts_of(loaded, digest(first, read)),
                index=window.index,
                epoch=window.epoch,
                window_samples=len(window.ids),
                window_digest=digest(0, window.ids),
                skipped=[reason for micro in loaded for reason in micro.skipped],
                notices=list(self._notices(loaded)),
            )

    def _settled(self, micro: MicroBatch) -> MicroBatch:
        """Pinned, or at least out of the shared memory through which processes pass it."""
        if self._pin_memory:
            return dataclasses.replace(micro, batch=pinned(micro.batch))
        if not self._workers:
            return micro
        return dataclasses.replace(micro, batch=map_tensors(lambda tensor: tensor.clone(), micro.batch))

    def _notices(self, loaded: Sequence[MicroBatch]) -> Iterator[str]:
        found = [self._ahead.notice]
        if any(micro.undeclared_draws for micro in loaded):
            found.append(DRAWS_UNDECLARED)
        for text in found:
            if text is not None and text not in self._told:
                self._told.add(text)
                yield text


def load_batches(
    task: Task, data: Samples, keys: Sequence[list[Key]], workers: int = 0
) -> Iterator[MicroBatch]:
    """Read the given lists of samples in order, for evaluation. A micro-batch may be empty (`MicroBatch.is_empty`).

    Raises:
        GatrainError: samples cannot be read or weighed.
    """
    if workers:
        return _bounded_processes(task, data, iter(keys), workers)
    return (samples.load(task, data, each, seed=0) for each in keys)


def _bounded_processes(
    task: Task, data: Samples, keys: Iterator[list[Key]], workers: int
) -> Iterator[MicroBatch]:
    ahead = ReadAhead(1, 1, True)
    for micro in _from_processes(task, data, itertools.islice(keys, 1), 0, ahead):
        size = bytes_of(micro.batch)
        ahead = bounded(workers, size, size, FreeMemory.of_this_rank())
        yield micro
    yield from _from_processes(task, data, keys, 0, ahead)


def _from_processes(
    task: Task, data: Samples, keys: Iterable[list[Key]], seed: int, ahead: ReadAhead
) -> Iterator[MicroBatch]:
    """The micro-batch of each list of keys, in order, loaded by processes."""
    loader = DataLoader(
        _MicroBatches(task, data, seed),
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=unchanged,
        num_workers=ahead.workers,
        worker_init_fn=offspring.follow_parent,
        prefetch_factor=ahead.prefetch,
        generator=torch.Generator(),  # the process's own generator stays untouched
    )
    for item in loader:
        if isinstance(item, Failure):
            raise item.kind(item.message)
        yield item


def unchanged(item: Any) -> Any:
    return item


def _while_quick(windows: Iterator[LoadedWindow]) -> Iterator[LoadedWindow]:
    """The windows up to where `SLOW_IN_ROW` of them took longer than `QUICK_S` to read."""
    slow = 0
    while slow < SLOW_IN_ROW:
        began = time.perf_counter()
        window = next(windows, None)
        if window is None:
            return
        slow = slow + 1 if time.perf_counter() - began > QUICK_S else 0
        yield window
        del window  # before the next one is read


def in_background(
    windows: Iterator[LoadedWindow], may_be_ahead: Callable[[], bool] = lambda: True
) -> Iterator[LoadedWindow]:
    """Run an iterator in a thread, one item ahead where ``may_be_ahead``. Errors arrive at the item where they
    happened."""
    items: queue.SimpleQueue[LoadedWindow | BaseException | None] = queue.SimpleQueue()
    wanted = threading.Semaphore(1)  # items that may be made now; one more for each that is taken
    stopped = threading.Event()

    def run() -> None:
        try:
            while not stopped.is_set():
                if wanted.acquire(timeout=0.1):
                    window = next(windows, None)
                    items.put(window)
                    if window is None:
                        return
                    del window  # the consumer's, who may want its memory back before the next is made
        except BaseException as error:  # handed over to the consumer, whatever it is
            items.put(error)

    thread = threading.Thread(target=run, name="gatrain-loader", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if ahead := may_be_ahead():
                wanted.release()
            yield item
            del item
            if not ahead:
                wanted.release()
    finally:
        stopped.set()
        thread.join(timeout=5)
