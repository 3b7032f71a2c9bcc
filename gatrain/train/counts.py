"""Weights and losses of a window: counted on the host beforehand, summed as they are used, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatrain.errors import ExactnessError
from gatrain.tasks.base import LossSum
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import unequal_steps_text
from gatrain.train.ranks import Ranks

MOST_SCALARS = 256
"""Scalars that are kept before they are added up: each has some hundred bytes on the device."""


class _Sums(NamedTuple):
    """What micro-steps add to."""

    counted: dict[str, float]
    """Weights that the host counted, since the last check."""
    used: dict[str, list[Any]]
    """Weights that the losses used, since the last check."""
    losses: dict[str, list[Any]]
    """Summed losses of the window in hand: detached scalars on the device."""


class Counts:
    """The weights of a window, counted beforehand (`of`) and afterwards (`check`), and its summed losses.

    Args:
        term_names: names of the loss terms, the same on every rank; needed where a rank may be empty.
        synchronised: names of the modules whose forward is a collective: ranks must have equally many.
    """

    def __init__(self, term_names: Sequence[str], ranks: Ranks, synchronised: Sequence[str] = ()) -> None:
        self._term_names = list(term_names)
        self._ranks = ranks
        self._synchronised = synchronised
        self._sums = _Sums({}, {}, {})

    def of(
        self, window: LoadedWindow, passes: Mapping[str, int] | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """T of each loss term and `LoadedWindow.counts`, over all ranks. Collective: one small sum on the host.

        Args:
            passes: how often a loss term is computed for the window, where that is not once; T is that of one pass,
                and 0 for a term that is not computed.

        Raises:
            ExactnessError: an unknown term, or a weight that is negative or not finite; on every rank.
        """
        local = dict.fromkeys(self._term_names, 0.0)
        for micro_batch in window.micro_batches:
            for name, weight in micro_batch.weights.items():
                if name not in local:
                    raise ExactnessError(f"weight() counted an unknown loss term {name!r}.")
                local[name] += float(weight)
        passes = passes or {}
        local.update({name: 0.0 for name, count in passes.items() if not count})
        steps = [0.0] * self._ranks.world_size * bool(self._synchronised)
        if steps:
            steps[self._ranks.rank] = float(len(window.micro_batches))
        summed = self._ranks.sum([*steps, *local.values(), *window.counts.values()])
        steps, summed = summed[: len(steps)], summed[len(steps) :]
        if len(set(steps)) > 1:
            raise ExactnessError(unequal_steps_text(self._synchronised, steps))
        totals = dict(zip(local, summed[: len(local)], strict=True))
        for name, total in totals.items():
            if not 0 <= total < float("inf"):
                raise ExactnessError(
                    f"weight() gave {total} for the loss term {name!r}; weights are 0 or more."
                )
        if any(totals.values()):
            counted = self._sums.counted
            for name, weight in local.items():
                counted[name] = counted.get(name, 0.0) + weight * passes.get(name, 1)
        return totals, dict(zip(window.counts, summed[len(local) :], strict=True))

    def add(self, terms: Mapping[str, LossSum]) -> None:
        """Note what a micro-step's loss came to, and the weights that it used. Nothing waits for the device."""
        _, used, losses = self._sums
        for name, (total, weight) in terms.items():
            _append(losses, name, total.detach())
            _append(used, name, weight.detach() if isinstance(weight, Tensor) else float(weight))

    def are_bad(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Whether the losses of these terms since `take_losses` are not finite on any rank: a scalar on the device.
        Collective; nothing waits for the device."""
        parts = [part for name in names for part in self._sums.losses.get(name, ())]
        bad = ~torch.isfinite(_sum(parts)) if parts else torch.zeros((), dtype=torch.bool, device=device)
        return self._ranks.any(bad)

    def take_losses(self) -> dict[str, Tensor]:
        """Summed loss of each term since the last call: float64 scalars on the device."""
        found = {name: _sum(parts) for name, parts in self._sums.losses.items()}
        self._sums.losses.clear()
        return found

    def take(self) -> tuple[Tensor, Tensor]:
        """Summed loss and weight used, over all terms, since the last window; forgets both. For trials."""
        found = [
            torch.as_tensor(sum(_sum(parts) for parts in kept.values()), dtype=torch.float64)
            for kept in (self._sums.losses, self._sums.used)
        ]
        self._sums.losses.clear()
        self._sums.used.clear()
        return found[0], found[1]

    def check(self) -> None:
        """Compare the weights counted on the host with those that the losses used, since the last check.

        Synchronises with the device. Not collective.

        Raises:
            ExactnessError: they differ; the message names both.
        """
        counted, used = dict(self._sums.counted), {n: _sum(parts) for n, parts in self._sums.used.items()}
        self._sums.counted.clear()
        self._sums.used.clear()
        for name in counted.keys() | used.keys():
            before, after = counted.get(name, 0.0), float(used.get(name, 0.0))
            if not agree(before, after, 1e-6):
                raise ExactnessError(
                    f"weight() counted {before:g} for the loss term {name!r}, but loss_sum() used {after:g}. "
                    "Both must apply the same mask (mind shifted labels and ignored positions); "
                    "the step would be wrong by that factor."
                )

    def aside(self) -> _Sums:
        """Begin with empty sums; returns the others, for `put_back`."""
        kept, self._sums = self._sums, _Sums({}, {}, {})
        return kept

    def noted(self) -> _Sums:
        """A copy of the sums as they are now, for `put_back`."""
        counted, used, losses = self._sums
        return _Sums(
            dict(counted),
            {name: list(parts) for name, parts in used.items()},
            {name: list(parts) for name, parts in losses.items()},
        )

    def forget_passes(self, sums: _Sums) -> None:
        """What losses came to and used is again as it was at `noted`; what the host counted stays."""
        used = {name: list(parts) for name, parts in sums.used.items()}
        losses = {name: list(parts) for name, parts in sums.losses.items()}
        self._sums = _Sums(self._sums.counted, used, losses)

    def leave_unchecked(self, sums: _Sums) -> None:
        """Weights counted and used since `noted` will not be compared; the losses stay."""
        used = {name: list(parts) for name, parts in sums.used.items()}
        self._sums = _Sums(dict(sums.counted), used, self._sums.losses)

    def put_back(self, sums: _Sums) -> None:
        """Forget everything since `aside` or `noted`."""
        self._sums = sums


def agree(counted: float, used: float, tolerance: float) -> bool:
    """Whether two weights are the same: whole numbers exactly, sums of real weights up to rounding."""
    are_whole = counted.is_integer() and used.is_integer()
    return abs(counted - used) <= tolerance * abs(counted) * (not are_whole)


def _append(kept: dict[str, list[Any]], name: str, value: Tensor | float) -> None:
    parts = kept.setdefault(name, [])
    parts.append(value)
    if len(parts) >= MOST_SCALARS:
        parts[:] = [_sum(parts)]


def _sum(parts: Sequence[Any]) -> Any:
    """Of scalars, in float64: on the device where any of them is there."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    numbers = sum(part for part in parts if not isinstance(part, Tensor))
    if not tensors:
        return numbers
    total = tensors[0].double() if len(tensors) == 1 else torch.stack(tensors).double().sum()
    return total + numbers if numbers else total
