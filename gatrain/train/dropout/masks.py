"""Masks as a function of keys: a counter-based generator out of integer operations on the device.

A sample's key is 64 bits. They are mixed by SplitMix64's finaliser, and the coordinates of an element then go in
one dimension after the other, each through a 32-bit finaliser with full avalanche ("lowbias32", C. Wellons,
https://nullprogram.com/blog/2018/07/31/). A coordinate counts and not a flat index, so an element has the same bit
however long the others of its batch are padded. No step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from gatrain.train.seeding import derive_seed, mixed

DROPOUT = 0x64726F70
"""The stream of dropout among the uses of a run's seed (`gatrain.train.seeding`)."""
STEP = 0x1E3779B97F4A7C15
"""Between the keys of two draws: odd, so that no two of a stream are alike."""
_ROWS, _COLUMNS = 0x1E3779B1, 0x05EBCA6B


def sample_keys(seed: tuple[int, ...], places: Sequence[int], device: torch.device) -> Tensor:
    """Keys of the samples at these places of a window, [samples], int64."""
    first, count = (places[0], len(places)) if places else (0, 0)
    if list(places) == list(range(first, first + count)):
        numbers = torch.arange(first, first + count, dtype=torch.int64, device=device)  # nothing to copy
    else:
        numbers = torch.tensor(list(places), dtype=torch.int64).to(device, non_blocking=True)
    return mixed(mixed(numbers) + derive_seed(*seed, DROPOUT))


def keep_mask(keys: Tensor, nth: int, shape: Sequence[int], batch_dim: int, keep: float) -> Tensor:
    """Which elements are kept: bool, of ``shape``.

    Args:
        keys: of the samples, [shape[batch_dim]], int64.
        nth: number of the draw; each has masks of its own.
        keep: chance of each element; it is met to 2**-32.
    """
    z = mixed(keys + (nth + 1) * 0x9E3779B97F4A7)
    low, high = z.to(torch.int32), (z >> 32).to(torch.int32)  # [b], two independent words
    sizes = [size for dim, size in enumerate(shape) if dim != batch_dim]
    for size in sizes[:-1]:
        place = torch.arange(size, dtype=torch.int32, device=keys.device)
        low = _mix32(low[..., None] + place * _ROWS)
        high = _mix32(high[..., None] + place * _COLUMNS)
    if sizes:
        place = torch.arange(sizes[-1], dtype=torch.int32, device=keys.device)
        # an affine sequence with a step of the row's own: rows are no shifted copies of each other
        low = place * (high | 1)[..., None] + low[..., None]
    # the last shift of the finaliser is left out: it moves the low bits, and the high ones decide
    low = (low ^ ((low >> 16) & 0xFFFF)) * 0x7FEB352D
    low = (low ^ ((low >> 15) & 0x1FFFF)) * _LAST
    mask = low < min(round(keep * 2**32) - 2**31, 2**31 - 1)  # [b, *sizes]
    return mask.movedim(0, batch_dim)


@library.custom_op("gatrain::keep_mask", mutates_args=())
def keep_mask_as_one(keys: Tensor, nth: int, shape: list[int], batch_dim: int, keep: float) -> Tensor:
    """`keep_mask` as one operator, for compiled code on a CPU: of torch 2.14's C++ backend its loops wrote beyond
    their memory (a mask of 16 x 4 x 33 x 65)."""
    return keep_mask(keys, nth, shape, batch_dim, keep).contiguous()


@keep_mask_as_one.register_fake
def _(keys: Tensor, nth: int, shape: list[int], batch_dim: int, keep: float) -> Tensor:
    return keys.new_empty(shape, dtype=torch.bool)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _LAST
    return x ^ ((x >> 16) & 0xFFFF)


_LAST = 0x846CA68B - 2**32
