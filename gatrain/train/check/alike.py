"""Whether samples and batches are the same, and whether they are the same memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def copied(samples: list[Any]) -> list[Any]:
    """Copies of the samples; what cannot be copied stands for itself."""
    found = []
    for sample in samples:
        try:
            found.append(copy.deepcopy(sample))
        except Exception:
            found.append(sample)
    return found


def share_memory(samples: Sequence[Any]) -> bool:
    """Whether the same tensor or array belongs to two of the samples."""
    seen: dict[int, int] = {}
    for nth, sample in enumerate(samples):
        for place in _memory(sample):
            if seen.setdefault(place, nth) != nth:
                return True
    return False


def _memory(sample: Any) -> Iterator[int]:
    """Where the tensors and arrays of a sample begin in memory."""
    for value in pytree.tree_leaves(sample):
        if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
            yield value.data_ptr()
        elif isinstance(value, np.ndarray) and value.size:
            yield value.__array_interface__["data"][0]


def same(one: Any, other: Any, depth: int = 0) -> bool:
    """Whether two samples or batches hold the same numbers; what cannot be compared counts as the same."""
    if depth > 8:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.is_sparse or one.is_nested:
            return type(one) is type(other)
        return one.shape == other.shape and bool(torch.equal(_without_nan(one), _without_nan(other)))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))
    if isinstance(one, bool | int | float | complex | str | bytes | np.generic):
        return bool(one == other) or (one != one and other != other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], depth + 1) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(lambda a, b: same(a, b, depth + 1), one, other))
    if type(one) is type(other) and hasattr(one, "tobytes"):  # an image
        return bool(one.tobytes() == other.tobytes())
    if type(one) is type(other) and isinstance(getattr(one, "__dict__", None), dict):
        return same(vars(one), vars(other), depth + 1)
    return True


def _without_nan(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor
