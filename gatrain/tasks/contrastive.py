"""Pairs that must find each other among all samples of an effective batch: InfoNCE, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatrain.tasks.base import Batch, LossSum
from gatrain.tasks.parts import check_factory, declared_length, find_splits, make_model
from gatrain.tasks.window import WindowTask


class Contrastive(WindowTask):
    """A model ``model(left, right)`` of pairs, trained so that ``left[i]`` scores highest with ``right[i]``.

    The loss is the mean of two cross-entropies (van den Oord et al. 2018, "Representation learning with contrastive
    predictive coding"; in both directions as in CLIP, Radford et al. 2021): every other sample of the effective
    batch is a negative. It needs ``gradient=cached``.

    Args:
        model: function without arguments that makes the module; it gives two tensors ``[B, d]``, whose products
            are scores, temperature included.
        data: a data source of pairs (left, right), as for `gatrain.tasks.Supervised`.
        window: samples of an effective batch, for the baseline: ``${batch.effective}``.
        eval_fraction: of a plain dataset, the share at its end that is held out.
    """

    def __init__(self, model: Any, data: Any, window: Any = None, eval_fraction: float = 0.0) -> None:
        self._factory = check_factory(model)
        self.train_data, self.eval_data = find_splits(data, eval_fraction)
        self._window = window
        self.variable_length = declared_length(data)

    def build_model(self) -> nn.Module:
        return make_model(self._factory)

    counts_samples = True

    def count_samples(self, batch: Batch) -> int | None:
        return len(batch[0])

    def weight(self, batch: Batch) -> int:
        return len(batch[0])

    def represent(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        left, right = model(batch[0], batch[1])  # [n, d] each
        return left, right

    def window_loss(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        scores = rows[0] @ rows[1].T  # [N, N]
        targets = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2

    def window_metrics(self, rows: tuple[Tensor, Tensor]) -> Mapping[str, LossSum]:
        """``recall_at_1``: share of left sides that score highest with their own right side."""
        best = (rows[0] @ rows[1].T).argmax(dim=1)
        return {"recall_at_1": ((best == torch.arange(len(best), device=best.device)).sum(), len(best))}

    def baseline(self) -> tuple[str, float] | None:
        """Scores that are all alike; their ``recall_at_1`` is 1 in as many as a window has."""
        if self.eval_data is None or not isinstance(self._window, int):
            return None
        among = min(self._window, len(self.eval_data))
        return "guessing", math.log(among)
