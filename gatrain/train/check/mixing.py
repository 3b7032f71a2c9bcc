"""Does a collate function that draws random numbers mix the samples of a batch, as mixup and cutmix do?

Its batches cannot be compared with those of their pieces, for which it draws other numbers. But equally seeded,
what it makes of some samples must not depend on which sample stands after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gatrain.tasks.base import Batch, Task, weights_of
from gatrain.train import samples as reading
from gatrain.train import seeding
from gatrain.train.batches import tensors_of
from gatrain.train.check.computing import TOLERANCE
from gatrain.train.check.faults import Fault
from gatrain.train.check.forwards import Forwards, number
from gatrain.train.check.host import HostSamples, Made
from gatrain.train.held_state import HeldState

SEEDS = 4
"""By chance the last sample may be mixed with itself, or a batch not mixed at all."""


def check_mixing(
    host: HostSamples, forwards: Forwards, chosen: Sequence[tuple[int, Any]], state: HeldState
) -> None:
    """
    Raises:
        Fault: the loss of some samples depends on what stands after them.
    """
    ids, samples = [key for key, _ in chosen], [sample for _, sample in chosen]
    for batches in beside_others(host.task, samples, host.keys(ids), forwards.seed):
        made = [
            Made(each, {name: float(w) for name, w in weights_of(host.task, each).items()}, tuple(ids[:-1]))
            for each in batches
        ]
        one, other = (forwards.from_start(each, state) for each in made)
        if one.is_finite and not forwards.agree(one, other, TOLERANCE[one.sixteen_bit or torch.float32]):
            raise Fault(fault(len(ids) - 1, number(one), number(other)))


def beside_others(
    task: Task, samples: Sequence[Any], keys: Sequence[tuple[int, int]], seed: int
) -> Iterator[tuple[Batch, Batch]]:
    """All but the last sample, cut out of a batch with it and of one with another in its place.

    Only where both are made with the same number of random numbers and have the same shapes: otherwise, as where
    padding is drawn for, different draws explain the difference.

    Yields:
        two batches of ``len(samples) - 1`` samples.
    """
    count = len(samples)
    if count < 2:
        return
    for nth in range(SEEDS):
        with_last, end = _made(task, list(samples), keys, seed + nth)
        for other in samples[: count - 1]:
            instead, other_end = _made(task, [*samples[: count - 1], other], keys, seed + nth)
            if not (seeding.same_random_state(end, other_end) and _shapes(with_last) == _shapes(instead)):
                continue
            cuts = [reading.split_batch(batch, [count - 1, 1], count) for batch in (with_last, instead)]
            if cuts[0] is not None and cuts[1] is not None:
                yield cuts[0][0], cuts[1][0]
            break


def _made(task: Task, samples: list[Any], keys: Sequence[tuple[int, int]], seed: int) -> tuple[Batch, Any]:
    """The batch, and the generators' state after it."""
    with seeding.seeded(seed, seeding.COLLATE, *keys[0]):
        batch = task.collate(reading.own_containers(samples))
        return batch, seeding.random_state()


def _shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_of(batch) if isinstance(tensor, Tensor)]


def fault(count: int, beside_one: str, beside_other: str) -> str:
    """What to tell of a collate function that mixes."""
    return (
        f"collate mixes samples: with the same random numbers, the loss of {count} samples is {beside_one} in a "
        f"batch with one further sample and {beside_other} beside another. Mixup, cutmix and the like would mix "
        "within each micro-batch alone (a micro-batch of one sample not at all), so the result would depend on the "
        "split. Mix in the dataset: let __getitem__ draw the other sample and its share from random, numpy.random "
        "or torch, which gatrain seeds for each sample, and return the mixture."
    )
