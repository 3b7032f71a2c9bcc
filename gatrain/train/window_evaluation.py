"""Evaluation of a loss of all samples of a window: held-out samples in windows as large as the effective batch.

Held-out samples in their order, cut into windows; those left over after the last whole window are left out, since a
smaller window is another task (fewer negatives). Where not even one is whole, all of them are one window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gatrain.errors import ConfigError
from gatrain.tasks.base import Batch, LossSum, named_loss_sums
from gatrain.tasks.window import Rows, count_of, loss_of_window
from gatrain.train.gathered_rows import gathered, joined
from gatrain.train.ranks import Ranks
from gatrain.train.samples import Key
from gatrain.train.seeding import EVALUATION, seeded


class WindowEvaluation:
    """Collects rows batch by batch, on this rank; at the end all ranks' rows become windows.

    Args:
        task: a `gatrain.tasks.window.WindowTask`, or one with the same methods.
        window_samples: of a whole window.
    """

    def __init__(self, task: Any, window_samples: int) -> None:
        self._task = task
        self._window_samples = window_samples
        self._parts: list[Rows] = []

    def add(self, represent: Callable[[Batch], Rows], batch: Batch, keys: Sequence[Key]) -> None:
        """A batch on the device, made of these samples."""
        rows = represent(batch)
        count = count_of(rows)
        if count > len(keys):
            raise ConfigError(
                f"represent() gave {count} rows for {len(keys)} held-out samples. It must give one for each sample."
            )
        places = torch.tensor([sample for _, sample in keys[:count]])  # fewer where some were unreadable
        self._parts.append((places.to(pytree.tree_leaves(rows)[0].device), rows))

    def sums(self, ranks: Ranks, device: torch.device) -> dict[tuple[str, str], LossSum]:
        """Loss sums and metric sums over all windows, with their weights. Collective; every rank computes the same,
        and they count on rank 0 alone."""
        if not any(ranks.gather(bool(self._parts))):
            return {}
        places, rows = gathered(ranks, joined(self._parts) if self._parts else None, device)[0]
        order = places.argsort()  # of the held-out split, whoever computed them
        found: dict[tuple[str, str], LossSum] = {}
        for first, last in windows_of(len(order), self._window_samples):
            one = pytree.tree_map(lambda leaf, part=order[first:last]: leaf[part], rows)
            with seeded(0, EVALUATION, first):  # the same numbers at each evaluation, whatever the split
                losses = named_loss_sums(loss_of_window(self._task, one))
                metrics: Mapping[str, LossSum] = getattr(self._task, "window_metrics", lambda rows: {})(one)
            for kind, terms in (("loss", losses), ("metric", metrics)):
                for name, (total, weight) in terms.items():
                    before = found.get((kind, name), (torch.zeros((), dtype=torch.float64), 0.0))
                    found[kind, name] = (before[0] + _number(total), before[1] + float(weight))
        return found if ranks.rank == 0 else {}


def windows_of(samples: int, window_samples: int) -> list[tuple[int, int]]:
    """First and last + 1 of each whole window; of all samples where they make no whole one."""
    if samples < window_samples:
        return [(0, samples)]
    return [(n * window_samples, (n + 1) * window_samples) for n in range(samples // window_samples)]


def _number(total: Tensor | float) -> Tensor:
    return torch.as_tensor(total, dtype=torch.float64).detach().cpu()
