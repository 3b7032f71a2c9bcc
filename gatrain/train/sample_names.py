"""What a sample is called in messages: its number and, where the dataset keeps a list of files, its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatrain.tasks.base import Samples
from gatrain.tasks.parts import Part

MOST_NAMED = 8
_LISTS_OF_FILES = ("samples", "imgs", "paths", "files", "filenames")


def names_of(data: Samples, ids: Sequence[int], failed: int | None = None) -> str:
    """Names of samples for a sentence: of the one that failed alone, where it is known."""
    if failed is not None and failed in ids:
        ids = [failed]
    return ", ".join(sample_name(data, index) for index in ids[:MOST_NAMED]) + (
        ", ..." if len(ids) > MOST_NAMED else ""
    )


def sample_name(data: Samples, index: int) -> str:
    """``17``, or ``17 (photos/cat.jpg)`` where the dataset keeps a list of files."""
    source, place = _origin(data, index)
    for attribute in _LISTS_OF_FILES:
        try:
            entry = getattr(source, attribute)[place]
            entry = entry[0] if isinstance(entry, list | tuple) else entry
        except Exception:
            continue
        if isinstance(entry, str | Path):
            return f"{index} ({entry})"
    return str(index)


def _origin(data: Any, index: int) -> tuple[Any, int]:
    """The dataset that a part, a subset or a concatenation reads a sample from, and its place there."""
    source: Any = data
    place = index
    try:
        for _ in range(8):
            if isinstance(source, Part):
                place, source = source.start + place, source.dataset
            elif hasattr(source, "dataset") and hasattr(source, "indices"):  # torch.utils.data.Subset
                place, source = int(source.indices[place]), source.dataset
            elif hasattr(source, "datasets") and hasattr(source, "cumulative_sizes"):  # ConcatDataset
                which = next(nth for nth, end in enumerate(source.cumulative_sizes) if place < end)
                place -= source.cumulative_sizes[which - 1] if which else 0
                source = source.datasets[which]
            else:
                break
    except Exception:  # a dataset of the user's own that only looks like one of these
        return data, index
    return source, place
