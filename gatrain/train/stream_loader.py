"""Windows of a stream: read in order from a stored position, by every rank, each taking its part."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from gatrain import batch, offspring
from gatrain.causes import told
from gatrain.config import RunConfig
from gatrain.errors import DataError, GatrainError
from gatrain.tasks.base import Task
from gatrain.tasks.streams import ENDLESS, LOOKED_AT, BrokenInStream, Stream, StreamReader, fingerprint
from gatrain.train import samples, seeding
from gatrain.train.batches import map_tensors, pinned
from gatrain.train.loader import Failure, in_background, unchanged
from gatrain.train.micro_batches import LoadedWindow, MicroBatch, counts_of
from gatrain.train.ranks import Ranks
from gatrain.train.windows import Cut, Window, WindowSchedule, digest

PRINT_BITS = 20
"""Of the first sample of each window, by which the ranks see that they read the same stream."""
AHEAD = 2
"""Windows that the loader process may have ready."""


@dataclass(frozen=True)
class StreamWindows(WindowSchedule):
    """The windows of a stream, as far as they are known before it is read: full ones, without end."""

    samples: int = ENDLESS
    effective_batch: int = 1
    seed: int = 0
    first: int = 0
    """Samples that can be looked at before training."""

    def window(self, index: int) -> Window:
        """For whoever looks at data before training: a window of the first samples."""
        return Window(index, 0, np.arange(min(self.effective_batch, self.first), dtype=np.int64))


@dataclass(frozen=True)
class StreamLoader:
    """Iterates over the loaded windows ``start`` to ``stop`` - 1 of this rank, from ``position`` of the stream.

    With ``workers`` one process reads ahead, whatever their number: a stream has one order. Without, a thread does
    where nothing in it can draw from the process's random generators, else the calling thread reads.

    Raises:
        GatrainError: while iterating, when samples cannot be read or weighed.
    """

    task: Task
    schedule: StreamWindows
    ranks: Ranks
    micro_batch: int
    shares: Sequence[int] | None
    start: int
    stop: int
    position: dict[str, Any] | None
    workers: int = 0
    pin_memory: bool = False
    cuts: Sequence[Cut] = ()

    def __iter__(self) -> Iterator[LoadedWindow]:
        if self.workers:
            yield from in_background(map(self._settled, _from_process(self)))
            return
        stream = self.task.train_data
        assert isinstance(stream, Stream)
        plain = stream.deterministic and self.task.collates_deterministically
        windows = map(self._settled, self.windows())
        yield from in_background(windows) if plain else windows

    def windows(self) -> Iterator[LoadedWindow]:
        """Read and collate, in this process."""
        stream, schedule = self.task.train_data, self.schedule
        assert isinstance(stream, Stream)
        reader = StreamReader(stream, schedule.seed, saves=True)
        notices = []
        if self.position is not None:
            with seeding.kept_random_state():
                reader.go_to(self.position)
            if reader.skipped and not reader.by_state:
                notices.append(
                    f"went on in the stream by reading past {reader.skipped:,} samples in {reader.skipped_s:.1f} "
                    "s: it has no state_dict() and load_state_dict() that give the very next sample again"
                )
        for index in range(self.start, self.stop):
            with seeding.kept_random_state():
                given = self._next_window(reader, self.schedule.effective_at(index))
                first_place = reader.place - len(given)
                epoch = reader.epoch
                loaded = self._loaded(index, epoch, first_place, given, notices)
                loaded = dataclasses.replace(loaded, position=reader.position())
            notices = []
            yield loaded

    def _next_window(self, reader: StreamReader, wanted: int) -> list[Any]:
        while True:
            given = reader.take(wanted)
            if len(given) == wanted or (given and reader.place > wanted and not self.schedule.drop_last):
                return given
            if reader.place < wanted and reader.place:
                raise DataError(
                    f"{reader.name} ended after {reader.place} samples, fewer than "
                    f"batch.effective={wanted}: no window could be filled. Use batch.effective={reader.place} "
                    "or less."
                )
            reader.next_epoch()

    def _loaded(
        self, index: int, epoch: int, place: int, given: list[Any], notices: list[str]
    ) -> LoadedWindow:
        window = Window(index, epoch, np.arange(place, place + len(given), dtype=np.int64))
        stage = self.schedule.stage_at(index) if len(self.cuts) > 1 else 0
        micro_batch, shares = self.cuts[stage] if self.cuts else (self.micro_batch, self.shares)
        first, ids = window.slice_of(self.ranks.rank, self.ranks.world_size, shares)
        sizes = batch.micro_batch_sizes(len(ids), micro_batch)
        starts = itertools.accumulate(sizes, initial=first)
        loaded = [self._micro_batch(window, given, at, size) for at, size in zip(starts, sizes, strict=False)]
        read = np.array([sample for micro in loaded for _, sample in micro.keys], dtype=np.int64)
        counts = counts_of(loaded, digest(first, read))
        if self.ranks.world_size > 1:
            bits = fingerprint(given[0]) % 2**PRINT_BITS
            counts |= {"print": bits, "print_squared": bits**2}
        return LoadedWindow(
            [micro for micro in loaded if not micro.is_empty],
            seed=(self.schedule.seed, seeding.MICRO_STEP, index),
            counts=counts,
            index=index,
            epoch=epoch,
            window_samples=len(given),
            window_digest=digest(0, window.ids),
            skipped=[reason for micro in loaded for reason in micro.skipped],
            notices=notices,
        )

    def _micro_batch(self, window: Window, given: list[Any], at: int, size: int) -> MicroBatch:
        keys = window.keys(at, size)
        part = [
            samples.Skipped(each.reason) if isinstance(each, BrokenInStream) else each
            for each in given[at : at + size]
        ]
        found = samples.load(self.task, self.task.train_data, keys, self.schedule.seed, given=part)
        return dataclasses.replace(found, position=at)

    def _settled(self, window: LoadedWindow) -> LoadedWindow:
        """Pinned, or at least out of the shared memory through which a process passes it."""

        def settle(batch_: Any) -> Any:
            if self.pin_memory:
                return pinned(batch_)
            return map_tensors(lambda tensor: tensor.clone(), batch_) if self.workers else batch_

        micro_batches = [
            dataclasses.replace(micro, batch=settle(micro.batch)) for micro in window.micro_batches
        ]
        return dataclasses.replace(window, micro_batches=micro_batches)


def ranks_read_the_same(counts: dict[str, float], world_size: int) -> bool:
    """Whether the summed prints of all ranks are those of one sample (by Cauchy and Schwarz, if and only if)."""
    if "print" not in counts:
        return True
    return int(counts["print_squared"]) * world_size == int(counts["print"]) ** 2


def streams_are_read(config: RunConfig, world_size: int) -> str:
    """How, for a person."""
    who = (
        "each of the ranks reads all of it and takes its part of each window"
        if world_size > 1
        else "it is read"
    )
    more = f"; of train.data_workers={config.train.data_workers} one reads it"
    return (
        f"the training data is a stream: {who}, in its own order (gatrain does not shuffle it)"
        f"{more if config.train.data_workers > 1 else ''}. Trials and checks saw its first {LOOKED_AT} samples "
        "at most."
    )


class _Windows(IterableDataset[Any]):
    """The windows of a loader, in its process."""

    def __init__(self, loader: StreamLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._loader.windows()
        except GatrainError as error:
            yield Failure(type(error), str(error))
        except (SystemExit, KeyboardInterrupt, Exception) as error:
            yield Failure(DataError, f"cannot read the stream: {told(error)}")


def _from_process(loader: StreamLoader) -> Iterator[LoadedWindow]:
    windows = DataLoader(
        _Windows(loader),
        batch_size=None,
        collate_fn=unchanged,
        num_workers=1,
        worker_init_fn=offspring.follow_parent,
        prefetch_factor=AHEAD,
        generator=torch.Generator(),  # the process's own generator stays untouched
    )
    for item in windows:
        if isinstance(item, Failure):
            raise item.kind(item.message)
        yield item
