"""Random inputs of a generator that belong to a sample, so that no split, rank or world size changes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gatrain.tasks.base import Samples
from gatrain.train.seeding import derive_seed, mixed

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class Keyed:
    """Samples with a key each: item i is ``(data[i], key)``, or ``(first part of data[i], key)``.

    The key is an int64 scalar, drawn from the numbers that every sample is seeded with: the run's seed, the epoch
    and i. So a sample has the same key in whichever micro-batch it is read, and another one in each epoch.

    Args:
        data: a map-style dataset.
        only_inputs: leave out what follows the first part of a sample, such as its label.
    """

    def __init__(self, data: Samples, only_inputs: bool = True) -> None:
        self._data, self._only_inputs = data, only_inputs

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        sample = self._data[index]
        if self._only_inputs and isinstance(sample, tuple | list):
            sample = sample[0]
        return sample, torch.randint(2**62, ())


def latents(keys: Tensor, *shape: int, which: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers [len(keys), *shape] on the keys' device, in the default dtype, each row a function of
    its key alone.

    A counter-based generator (SplitMix64's finaliser) with Box and Muller's transform; torch's generators are left
    alone.

    Args:
        keys: int64 [samples], such as `Keyed` gives.
        which: integers that tell several draws for the same samples apart, such as the phase's number and update.
    """
    count = math.prod(shape)
    places = torch.arange(2 * count, dtype=torch.int64, device=keys.device)  # two numbers for each
    words = mixed(mixed(keys + derive_seed(*which))[:, None] + places * _GOLDEN)  # [samples, 2 * count]
    uniform = (((words >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53  # in (0, 1)
    radius, angle = uniform[:, :count].log().mul(-2).sqrt(), uniform[:, count:].mul(2 * math.pi)
    drawn = radius * angle.cos()
    return drawn.to(torch.get_default_dtype()).reshape(-1, *shape)
