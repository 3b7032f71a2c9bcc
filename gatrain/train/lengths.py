"""Whether batches differ in shape from one to the next, found by reading some: nobody has to know a word for it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gatrain.tasks.base import Batch, Task
from gatrain.train import samples
from gatrain.train.batches import tensors_of

SAMPLES, LEAST = 64, 8
"""Random samples that are read, and those that are read however long it takes."""
SECONDS = 3.0
TOGETHER = 4
"""Samples in each of the batches that are compared."""


@dataclass(frozen=True)
class Lengths:
    """What the samples that were read show."""

    vary: bool
    sizes: tuple[int, ...] = ()
    """Numbers in each sample's tensors, where batches differ."""
    sentence: str = ""
    """What to tell a person where batches differ and nobody said so."""


def notice_lengths(task: Task, seed: int) -> Lengths:
    """Set ``task.variable_length`` if neither the task nor its data declare it; a declaration is never changed.

    A collate function that pads every batch to one shape makes batches that do not differ. What cannot be read or
    collated here is left to whoever trains with it: they say what is wrong.
    """
    if task.variable_length is not None:
        return Lengths(task.variable_length)
    try:
        found = _look(task, seed)
    except Exception:
        found = Lengths(False)
    task.variable_length = found.vary
    return found


def shapes_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Shapes of all tensors of a batch, in order."""
    return tuple(tuple(tensor.shape) for tensor in tensors_of(batch))


def _look(task: Task, seed: int) -> Lengths:
    together = TOGETHER if len(task.train_data) >= 2 * TOGETHER else 1
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    sizes: list[int] = []
    group: list[tuple[samples.Key, Any]] = []
    for key, sample in _some(task, seed):
        sizes.append(sum(tensor.numel() for tensor in tensors_of(sample)))
        group.append((key, sample))
        if len(group) == together:
            keys, found = zip(*group, strict=True)
            shapes.add(shapes_of(samples.collated(task, list(found), keys, seed)))
            group = []
    if len(shapes) < 2:
        return Lengths(False)
    low, high = _ends(shapes)
    return Lengths(
        True,
        tuple(sizes),
        f"Batches differ in shape (of {together} samples: {low} to {high}), so lengths are compiled as dynamic and "
        "trials time usual batches; variable_length = True or False on the data says it without a look.",
    )


def _some(task: Task, seed: int) -> Iterator[tuple[samples.Key, Any]]:
    """Random samples, the same in every process; fewer where reading is slow."""
    total = len(task.train_data)
    began = time.monotonic()
    for nth, index in enumerate(random.Random(0).sample(range(total), min(total, SAMPLES))):
        if nth >= LEAST and time.monotonic() - began > SECONDS:
            return
        key = (0, index)
        yield key, samples.read_one(task, task.train_data, key, seed)


def _ends(shapes: set[tuple[tuple[int, ...], ...]]) -> tuple[str, str]:
    """The smallest and the largest shape of the first tensor that differs."""
    for same_tensor in zip(*shapes, strict=False):
        if len(set(same_tensor)) > 1:
            low, high = min(same_tensor), max(same_tensor)
            return " x ".join(map(str, low)), " x ".join(map(str, high))
    return "fewer tensors", "more"
