"""A task whose loss is a function of all samples of an effective batch, such as a contrastive one."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatrain.errors import ConfigError
from gatrain.tasks.base import Batch, LossSum, LossSums, Task

Rows = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors, each with one row for each sample."""


class WindowTask(Task):
    """What ``gradient=cached`` trains: `represent` computes each sample by itself, `window_loss` compares them all.

    A subclass gives `represent`, `window_loss` and, as every task, ``build_model``, ``weight`` and the data. With
    ``gradient=cached`` it is trained exactly for any split into micro-batches and over any number of ranks, at the
    price of one forward more for each micro-batch. Held-out samples are evaluated in windows as large as the
    effective batch, in their order; where there is at least one whole window, samples left over are left out.
    """

    @abc.abstractmethod
    def represent(self, model: nn.Module, batch: Batch) -> Rows:
        """Run the model on a batch on the device, under autocast: one row for each sample.

        A row may depend on its own sample alone (no BatchNorm over the batch); it may be of any shape, the same
        for all samples. Whole numbers, such as classes, are handed on to `window_loss` without a gradient.
        """

    @abc.abstractmethod
    def window_loss(self, rows: Rows) -> Tensor | LossSums:
        """The loss of a window from all of its rows, in the order of its samples, over all ranks.

        It trains the model by way of the rows alone: parameters that it would use itself, such as a temperature,
        belong into `represent` (`gatrain.models.two_towers`).

        Returns:
            A mean over the window, a scalar, where `weight` counts samples. Or, as `loss_sum` does, a sum with the
            weight that it used, or a mapping from each loss term to such a pair.
        """

    def window_metrics(self, rows: Rows) -> Mapping[str, LossSum]:
        """Further sums for evaluation over a window of held-out samples, each with its denominator."""
        return {}

    def loss_sum(self, model: nn.Module, batch: Batch) -> LossSums:
        """The loss of a batch that is a window by itself."""
        rows = self.represent(model, batch)
        return loss_of_window(self, rows)


def takes_window_loss(task: Any) -> bool:
    """Whether a task gives what ``gradient=cached`` needs."""
    return callable(getattr(task, "represent", None)) and callable(getattr(task, "window_loss", None))


def loss_of_window(task: Any, rows: Rows) -> LossSums:
    """`WindowTask.window_loss` as sums with their weights; a mean counts as one over the samples."""
    found: Tensor | LossSums = task.window_loss(rows)
    if isinstance(found, Tensor):
        count = float(count_of(rows))
        return found * count, count
    return found


def count_of(rows: Rows) -> int:
    """Number of samples.

    Raises:
        ConfigError: no tensors, or tensors with different numbers of rows.
    """
    leaves = pytree.tree_leaves(rows)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise ConfigError(
            f"represent() returned {kinds}. It must return a tensor with one row for each sample, or a tuple or "
            "dict of such tensors."
        )
    counts = {len(leaf) for leaf in leaves}
    if len(counts) > 1:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise ConfigError(
            f"represent() returned tensors with different numbers of rows ({shapes}). Each must have one row for "
            "each sample of the batch, in the batch's order."
        )
    return counts.pop()
