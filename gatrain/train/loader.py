"""From the window schedule to this rank's micro-batches on the host, at least one window ahead.

A window is loaded whole before its first forward, since its weights must be known by then.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gatrain import batch
from gatrain.errors import DataError, GatrainError
from gatrain.tasks.base import Samples, Task, named_weights
from gatrain.train.accumulate import MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.windows import Ids, Window, WindowSchedule, derive_seed, digest

Key = tuple[int, int]
"""(epoch, sample id): what a sample's random augmentation depends on, besides the run's seed."""


@dataclass(frozen=True)
class LoadedWindow:
    """This rank's part of a window, on the host (pinned where the device is a GPU)."""

    index: int
    epoch: int
    samples: int
    """Samples of the whole window, all ranks."""
    digest: int
    """This rank's part of the window's fingerprint; the ranks' parts add up."""
    tokens: int | None
    """Input tokens of this rank's part."""
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class _Loaded:
    micro_batch: MicroBatch
    tokens: int | None


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a loader process, which would wrap it in a stack trace."""

    message: str


class _MicroBatches(Dataset[Any]):
    """Reads, collates and weighs one micro-batch of samples; runs in loader processes too."""

    def __init__(self, task: Task, data: Samples, seed: int) -> None:
        self._task = task
        self._data = data
        self._seed = seed
        self._deterministic = is_deterministic(data)

    def __getitem__(self, key: Key) -> Any:
        raise NotImplementedError("micro-batches are read whole, through __getitems__")

    def __getitems__(self, keys: list[Key]) -> _Loaded | _Failure:
        try:
            collated = self._task.collate(self._read(keys))
            weights = named_weights(self._task.weight(collated))
            return _Loaded(MicroBatch(collated, weights), self._task.tokens(collated))
        except GatrainError as error:
            return _Failure(str(error))
        except Exception as error:
            ids = ", ".join(str(sample) for _, sample in keys[:8]) + (", ..." if len(keys) > 8 else "")
            return _Failure(f"cannot load the samples {ids}: {type(error).__name__}: {error}")

    def _read(self, keys: list[Key]) -> list[Any]:
        if self._deterministic:
            ids = [sample for _, sample in keys]
            if hasattr(self._data, "__getitems__"):
                return list(self._data.__getitems__(ids))
            return [self._data[sample] for sample in ids]
        return [self._read_seeded(*key) for key in keys]

    def _read_seeded(self, epoch: int, sample: int) -> Any:
        seed = derive_seed(self._seed, epoch, sample)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return self._data[sample]


def is_deterministic(data: Samples) -> bool:
    """Whether reading a sample draws no random number (the data says so, or is a TensorDataset)."""
    return bool(getattr(data, "deterministic", isinstance(data, TensorDataset)))


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Reading a seeded sample in this process must not disturb the generators of the model."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class WindowLoader:
    """Iterates over the loaded windows ``start`` to ``stop`` - 1 of this rank.

    ``shares`` are the plan's samples of each rank in a full window; None means that all ranks are equal.

    With ``workers`` processes, or for deterministic data in a thread, the next window is read while the current
    one is computed. Random data without loader processes is read in the calling thread, because the random
    generators belong to the whole process.

    Raises:
        DataError: while iterating, when samples cannot be read or weighed.
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
    ) -> None:
        self._schedule = schedule
        self._ranks = ranks
        self._micro_batch = micro_batch
        self._shares = shares
        self._range = range(start, stop)
        self._pin_memory = pin_memory
        self._read_ahead = workers > 0 or is_deterministic(task.train_data)
        self._loader = host_loader(task, task.train_data, self._all_keys(), schedule.seed, workers)

    def __iter__(self) -> Iterator[LoadedWindow]:
        return _in_background(self._load()) if self._read_ahead else self._load()

    def _mine(self, window: Window) -> tuple[int, Ids, list[int]]:
        """This rank's part of a window: first position, sample ids, and the sizes to cut them into."""
        first, ids = window.slice_of(self._ranks.rank, self._ranks.world_size, self._shares)
        return first, ids, batch.micro_batch_sizes(len(ids), self._micro_batch)

    def _all_keys(self) -> Iterator[list[Key]]:
        for index in self._range:
            window = self._schedule.window(index)
            _, ids, sizes = self._mine(window)
            ends = itertools.accumulate(sizes)
            for size, end in zip(sizes, ends, strict=True):
                yield [(window.epoch, sample) for sample in ids[end - size : end].tolist()]

    def _load(self) -> Iterator[LoadedWindow]:
        source = iter(self._loader)
        for index in self._range:
            window = self._schedule.window(index)
            first, ids, sizes = self._mine(window)
            with contextlib.nullcontext() if self._read_ahead else _random_state_kept():
                loaded = [next(source) for _ in sizes]
            for item in loaded:
                if isinstance(item, _Failure):
                    raise DataError(item.message)
            counted = [item.tokens for item in loaded if item.tokens is not None]
            micro_batches = [item.micro_batch for item in loaded]
            if self._pin_memory:
                micro_batches = [MicroBatch(_pinned(m.batch), m.weights) for m in micro_batches]
            yield LoadedWindow(
                index=index,
                epoch=window.epoch,
                samples=len(window.ids),
                digest=digest(first, ids),
                tokens=sum(counted) if len(counted) == len(loaded) else None,
                micro_batches=micro_batches,
            )


def host_loader(
    task: Task, data: Samples, keys: Iterator[list[Key]] | Sequence[list[Key]], seed: int, workers: int
) -> DataLoader[Any]:
    """A DataLoader that gives one `_Loaded` or `_Failure` for each list of keys, in order."""
    return DataLoader(
        _MicroBatches(task, data, seed),
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # the process's own generator stays untouched
    )


def load_batches(
    task: Task, data: Samples, keys: Sequence[list[Key]], workers: int = 0
) -> Iterator[MicroBatch]:
    """Read the given lists of samples in order, for evaluation.

    Raises:
        DataError: samples cannot be read or weighed.
    """
    source = iter(host_loader(task, data, keys, seed=0, workers=workers))
    for _ in keys:
        with _random_state_kept():
            item = next(source)
        if isinstance(item, _Failure):
            raise DataError(item.message)
        yield item.micro_batch


def _unchanged(item: Any) -> Any:
    return item


def _pinned(nested: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.pin_memory() if isinstance(leaf, Tensor) else leaf, nested)


def _in_background(windows: Iterator[LoadedWindow]) -> Iterator[LoadedWindow]:
    """Run an iterator in a thread, one item ahead. Errors arrive at the item where they happened."""
    items: queue.Queue[LoadedWindow | BaseException | None] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def offer(item: LoadedWindow | BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.1)
                return True
        return False

    def run() -> None:
        try:
            for window in windows:
                if not offer(window):
                    return
            offer(None)
        except BaseException as error:  # handed over to the consumer, whatever it is
            offer(error)

    thread = threading.Thread(target=run, name="gatrain-loader", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)
