"""`gatrain.accumulate`: the exact gradient of one window, for people who keep their own training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.tasks.base import Batch, LossSums, Task, Weights, named_weights
from gatrain.train.batches import move_to
from gatrain.train.dropout import RandomNumbers
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.main_gradients import MainGradients, MasterWeights, half_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.parallel import Replicated
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step
from gatrain.train.window_result import WindowResult


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[Batch],
    *,
    loss_sum: Callable[[nn.Module, Batch], LossSums],
    weight: Callable[[Batch], Weights],
    term_names: Sequence[str] = ("loss",),
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    master_weights: MasterWeights | None = None,
) -> WindowResult:
    """Put the exact gradient of one window into ``.grad``: for people who keep their own training loop.

    16-bit parameters: with ``master_weights`` their gradient is found in fp32, in the ``.grad`` of the masters.
    Without, it is summed in fp32 over micro-batches and ranks all the same and rounded once into ``.grad``.

    Works in one process, under torch.distributed with a plain model (gradients are added once, after all
    micro-steps), and with a model in DistributedDataParallel (they are added while the last backward runs, by
    gatrain itself: parameters that some micro-steps or ranks do not use are right too, with any of its options
    but static_graph). A rank may have no micro-batch at all. Clip, step and zero the gradients yourself.

    Args:
        model: parameters on one device; the same parameters on every rank.
        micro_batches: this rank's part of the window, on the host or the device; sizes may differ.
        loss_sum: ``(model, batch) -> (sum of weighted losses, weight used)``; never a mean. Several terms with
            denominators of their own: a mapping from name to such a pair.
        weight: counts the weight of a batch beforehand: samples, label tokens, or a mapping for several terms.
        term_names: names of the terms where ``weight`` returns a mapping.
        autocast: for example ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        scaler: fp16 scaler; call ``scaler.unscale_``, ``step`` and ``update`` once per window yourself.
        master_weights: of a model with 16-bit parameters (`gatrain.MasterWeights`); step those.

    Returns:
        The totals over all ranks; ``loss()`` gives the mean loss of the window.

    Raises:
        ExactnessError: ``loss_sum`` used another weight than ``weight`` counted.
        ConfigError: DistributedDataParallel with static_graph, or over a part of the ranks; a sharded model.
    """
    if master_weights is None and half_parameters(model):
        with MainGradients(model) as sums:
            return _accumulate(model, micro_batches, loss_sum, weight, term_names, autocast, scaler, sums)
    if master_weights is not None:
        master_weights.take_changes()
    return _accumulate(model, micro_batches, loss_sum, weight, term_names, autocast, scaler, master_weights)


def _accumulate(
    model: nn.Module,
    micro_batches: Iterable[Batch],
    loss_sum: Callable[[nn.Module, Batch], LossSums],
    weight: Callable[[Batch], Weights],
    term_names: Sequence[str],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    scaler: torch.amp.GradScaler | None,
    main_gradients: MainGradients | None,
) -> WindowResult:
    listed = [MicroBatch(batch, named_weights(weight(batch))) for batch in micro_batches]
    device = next(model.parameters()).device
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    step = gradient_step(
        model,
        lambda batch: loss_sum(model, batch),
        term_names=term_names,
        ranks=Ranks.current(),
        sync="overlap" if wrapped else "window",
        stage=lambda batch: lambda: move_to(batch, device),
        autocast=autocast,
        scaler=scaler,
        main_gradients=main_gradients,
    )
    return step.gradient(LoadedWindow(listed))[0]


def gradient_step(
    model: nn.Module,
    loss_sum: Callable[[Batch], LossSums],
    *,
    term_names: Sequence[str],
    ranks: Ranks,
    sync: str = "window",
    stage: Callable[[Batch], Callable[[], Batch]],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    main_gradients: MainGradients | None = None,
    strategy: GradientStrategy | None = None,
    parallel: Replicated | None = None,
    task: Task | None = None,
    method: Callable[[str], Callable[..., Any]] | None = None,
    random: RandomNumbers | None = None,
) -> Step:
    """A step of a model that is the same on all ranks already. It gives gradients; see `Step.updates_with`."""
    strategy, parallel = strategy or Plain(), parallel or Replicated()
    overlaps = sync == "overlap" and strategy.overlaps
    parallel.set_up(model, ranks, main_gradients=main_gradients, overlaps=overlaps)
    return Step(
        model,
        loss_sum,
        term_names=term_names,
        parallel=parallel,
        strategy=strategy,
        stage=stage,
        autocast=autocast,
        scaler=scaler,
        task=task,
        method=method,
        random=random,
    )
