"""A weight for each sample: a column of the batch, or a function of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gatrain.errors import ConfigError, DataError
from gatrain.tasks.base import Batch
from gatrain.tasks.forms import chosen, fields_of, shown


class SampleWeights:
    """Where the weights of the samples come from. A weight of 2 counts a sample twice, in the loss and in
    its mean.

    Args:
        given: name or position of the column of a batch that holds them, a function of the batch (on the
            host and on the device) that gives them, or None: every sample counts once.

    Raises:
        ConfigError: neither of these.
    """

    def __init__(self, given: str | int | Callable[[Batch], Tensor] | None) -> None:
        if not (given is None or isinstance(given, str | int) or callable(given)):
            raise ConfigError(
                f"task.sample_weight={given!r} is neither the name of a column of the batch nor a function "
                f"of the batch."
            )
        self._given = given

    @property
    def are_given(self) -> bool:
        return self._given is not None

    @property
    def column(self) -> str | int | None:
        return None if callable(self._given) else self._given

    def of(self, batch: Batch, count: int) -> Tensor | None:
        """Float64 ``[count]`` on the batch's device; None if every sample counts once.

        Raises:
            ConfigError: there is no such column, or it is not one number for each sample.
            DataError: a weight that is negative or not finite (looked for on the host alone).
        """
        if self._given is None:
            return None
        if callable(self._given):
            weights: Any = self._given(batch)
        else:
            weights = chosen(batch, self._given, "task.sample_weight", "a batch is")
        if not isinstance(weights, Tensor) or weights.numel() != count or weights.shape[:1] != (count,):
            raise ConfigError(
                f"task.sample_weight={self._name} gives {shown(weights)} for {count} samples; it must be a "
                f"tensor with one number for each."
            )
        found = weights.reshape(count).to(torch.float64)
        if found.device.type == "cpu" and not bool(((found >= 0) & found.isfinite()).all()):
            worst = found[~((found >= 0) & found.isfinite())][0]
            raise DataError(f"task.sample_weight={self._name} gives {float(worst):g}; weights are 0 or more.")
        return found

    def without_column(self, batch: Batch) -> Batch:
        """The batch as a model or a pair of (inputs, targets) is made of it."""
        if (column := self.column) is None:
            return batch
        entries = fields_of(batch) or {}
        place = int(column) if isinstance(column, str) and column.isdigit() else column
        kept = {name: each for name, each in entries.items() if name not in (column, place)}
        return (
            kept
            if isinstance(batch, Mapping) or not isinstance(batch, tuple | list)
            else tuple(kept.values())
        )

    @property
    def _name(self) -> str:
        return getattr(self._given, "__name__", str(self._given))
