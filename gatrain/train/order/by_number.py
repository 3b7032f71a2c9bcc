"""Which data sets are read by number."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


def reads_by_number(dataset: Any) -> bool:
    """Whether there is a sample for each number below a length.

    Every class of torch's has a ``__getitem__``, which only raises: an IterableDataset with a ``__len__`` is a
    stream all the same.
    """
    get = getattr(type(dataset), "__getitem__", None)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and get is not Dataset.__getitem__
