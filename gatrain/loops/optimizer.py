"""`gatrain.AccumulatingOptimizer`: an optimizer that steps once in K calls of ``step``, for loops that read
nothing ahead."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, ExactnessError
from gatrain.loops.factors import Steps, checked_steps, steps_at
from gatrain.loops.terms import NEEDED, Losses, Used, named_terms
from gatrain.loops.watch import Watch
from gatrain.train.accumulate import gradient_step
from gatrain.train.main_gradients import MasterWeights, half_names, half_parameters
from gatrain.train.ranks import Ranks
from gatrain.train.window_result import WindowResult


class AccumulatingOptimizer:
    """Steps an optimizer once in ``accumulation_steps`` calls, with the exact gradient of all that lies
    between.

    .. code-block:: python

        optimizer = gatrain.AccumulatingOptimizer(
            torch.optim.AdamW(model.parameters()), model, accumulation_steps=4, clip_norm=1.0
        )
        for x, y in loader:
            optimizer.backward(mean_loss=criterion(model(x), y), weight=len(x))
            if optimizer.step():   # True in every fourth call: an update was made
                scheduler.step()
            optimizer.zero_grad()  # between windows; within one it leaves the gradients alone
        optimizer.flush()          # the last, short window

    An optimizer cannot know how much a window will hold until it is over. So each backward says its weight:
    the gradients of SUMS add up, are divided by the whole weight of all micro-batches and ranks once, are
    added over the ranks, clipped, and stepped. Within a window they are kept divided by a power of two near
    its expected weight, which costs no accuracy and keeps them in the range of fp16 that a mean has.

    Several loss terms with denominators of their own cannot be told apart in a sum of gradients: they need
    the weight beforehand, as `gatrain.Accumulator` has it.

    Args:
        optimizer: any of torch's kind. A learning-rate scheduler takes this one.
        model: whose parameters it steps; also in DistributedDataParallel, which is kept from reducing by
            itself until `close`.
        accumulation_steps: micro-batches of a window, or a number from each epoch on: ``{0: 4, 8: 8}`` with
            `set_epoch`. With them the effective batch changes, and the learning rate does not.
        clip_norm: largest L2 norm of the whole gradient. Clipping in the loop would clip micro-batches, and
            is refused.
        scaler: fp16 scaler: its ``scale``, ``unscale_``, ``step`` and ``update`` are called here.
        master_weights: of a model with 16-bit parameters (`gatrain.MasterWeights`), which ``optimizer``
            steps.

    Raises:
        ConfigError: accumulation steps below 1; 16-bit parameters without master weights; an ``optimizer``
            that steps none of the model's parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        accumulation_steps: Steps,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        master_weights: MasterWeights | None = None,
    ) -> None:
        if master_weights is None and (half := half_parameters(model)):
            raise ConfigError(
                f"the model has {half_names(p.dtype for p in half)} parameters, whose gradients would be "
                f"added up in 16 bits. Make masters = gatrain.MasterWeights(model), give the optimizer "
                f"masters.parameters(), and give master_weights=masters."
            )
        self.optimizer = optimizer
        """The optimizer itself."""
        self.accumulation_steps = checked_steps(accumulation_steps)
        self.micro_steps = 0
        """Backward passes since the last update."""
        self.updates = 0
        """Updates made."""
        self.grad_norm: Tensor | None = None
        """L2 norm of the last window's gradient before clipping: a scalar on the device."""
        self._result: WindowResult | None = None
        self._backwards = 0  # since the last call of `step`
        self._weight, self._nominal = 0.0, 1.0
        self._has_passes = False
        self._epoch: int | None = None
        self._clip_norm, self._scaler, self._masters = clip_norm, scaler, master_weights
        self._step = gradient_step(
            model,
            lambda terms: terms,  # the loop has computed them
            term_names=("loss",),
            ranks=Ranks.current(),
            stage=lambda batch: lambda: batch,
            scaler=scaler,
            main_gradients=master_weights,
        )
        self._parallel, self._ranks = self._step.parallel, self._step.ranks
        self._watch = Watch(self._parallel.parameters)
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not stepped & {id(p) for p in self._parallel.parameters}:
            raise ConfigError(
                "the optimizer steps no parameter of the model"
                + (
                    ", whose 16-bit ones have masters: give it master_weights.parameters()."
                    if master_weights
                    else "."
                )
            )
        self._without_reduction = contextlib.ExitStack()
        self._without_reduction.enter_context(self._parallel.micro_step())
        self._begin()

    # --- the loop -----------------------------------------------------------------------------------------

    def backward(
        self, *, loss_sum: Losses | None = None, mean_loss: Losses | None = None, weight: Used | None = None
    ) -> None:
        """Backward of one micro-batch, noting its weight.

        Args:
            loss_sum: sum over its samples or tokens, a scalar. Or instead:
            mean_loss: their mean, as most losses return it.
            weight: what the mean divides by: samples, label tokens, summed class weights. A host number: one
                on the device is waited for.

        Raises:
            ConfigError: no loss; several terms.
            ExactnessError: the gradients were changed since the last backward.
        """
        given = loss_sum if mean_loss is None else mean_loss
        if isinstance(given, Mapping) or isinstance(weight, Mapping):
            raise ConfigError(
                "several loss terms have denominators of their own, and a sum of their gradients cannot be "
                "told apart afterwards. gatrain.Accumulator counts them beforehand."
            )
        if given is None or weight is None:
            raise ConfigError(NEEDED)
        self._check_unchanged()
        amount = float(weight)
        if not 0 <= amount < math.inf:
            raise ExactnessError(f"weight={amount} was given to backward; weights are 0 or more.")
        terms = named_terms(loss_sum, mean_loss, amount)
        self._backwards += 1
        self._weight += amount
        if terms:
            if not self._has_passes:
                expected = max(amount, 1.0) * self._steps_now() * self._ranks.world_size
                self._nominal = 2.0 ** round(
                    math.log2(expected)
                )  # a power of two: dividing by it rounds nothing
                if self._masters is not None:
                    self._masters.take_changes()
            self._has_passes = True
            self._step.forward_backward(terms, {"loss": 1 / self._nominal})
        self._watch.note()

    def step(self, closure: None = None) -> bool:
        """End a micro-step. The last one of a window makes the update. Collective then.

        Returns:
            Whether an update was made, as for a scheduler that follows it. False too for a window without
            weight, and for one that the fp16 scaler skipped.

        Raises:
            ConfigError: no backward came before; a closure.
            ExactnessError: the gradients were changed since the last backward.
        """
        if closure is not None:
            raise ConfigError(
                "an optimizer with a closure computes the loss several times, and cannot accumulate."
            )
        if not self._backwards:
            raise ConfigError(
                "optimizer.step() without optimizer.backward(mean_loss=loss, weight=len(batch)) before it: "
                "an optimizer alone does not know how many samples a gradient is of. Call that in the place "
                "of loss.backward()."
            )
        self._backwards = 0
        self.micro_steps += 1
        if self.micro_steps < self._steps_now():
            return False
        return self._close(is_last=False)[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Between windows, forget gradients; within one it does nothing, so that loops may call it in each
        step."""
        if not self._has_passes:
            self.optimizer.zero_grad(set_to_none)

    def flush(self) -> int:
        """Step what is left of a window, at the end of the data. Collective: every rank calls it once.

        A rank whose data ended before another's takes part in the others' windows until all have ended.

        Returns:
            Number of updates made.
        """
        made, all_ended = 0, False
        while not all_ended:
            update, all_ended = self._close(is_last=True)
            made += update
        return made

    def set_epoch(self, epoch: int) -> None:
        """The epoch begins, from 0: the accumulation steps of a schedule follow it.

        Raises:
            ExactnessError: in the middle of a window.
        """
        if self._has_passes:
            raise ExactnessError(
                "an epoch begins in the middle of a window. Call optimizer.flush() before it."
            )
        self._epoch = epoch

    def close(self) -> None:
        """Give DistributedDataParallel back its own reduction."""
        self._without_reduction.close()

    def loss(self) -> float:
        """Mean loss of the last window over all ranks; nan before the first. Collective; waits for the
        device."""
        return math.nan if self._result is None else self._result.loss()

    # --- the optimizer's own --------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, between windows.

        Raises:
            ExactnessError: in the middle of a window, whose gradients would be lost.
        """
        if self._has_passes:
            raise ExactnessError(
                "a state in the middle of a window would lose it. Save after a step that returned True."
            )
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    # --- windows --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.micro_steps = 0
        self._backwards = 0
        self._weight = 0.0
        self._nominal = 1.0
        self._has_passes = False
        self._watch.forget()
        self._parallel.begin_window()

    def _steps_now(self) -> int:
        return steps_at(self.accumulation_steps, self._epoch)

    def _close(self, is_last: bool) -> tuple[bool, bool]:
        """End the window on all ranks; gives whether an update was made, and whether every rank's data has
        ended."""
        self._check_unchanged()
        ranks, parallel = self._ranks, self._parallel
        total, last = ranks.sum([self._weight, float(is_last)])
        made = total > 0
        if made:
            for parameter in parallel.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._nominal / total)
            parallel.reduce()
            made = self._update()
        if total > 0 or self._has_passes:
            parallel.drop_gradients()
        losses = self._step.counts.take_losses()
        if total > 0:
            self._result = WindowResult({"loss": total}, {}, losses, ranks, self._step.device)
        self._step.counts.take()
        self._begin()
        return made, last == ranks.world_size

    def _update(self) -> bool:
        scaler, optimizer = self._scaler, self.optimizer
        scale = 1.0
        if scaler is not None:
            scale = scaler.get_scale()
            scaler.unscale_(optimizer)
        self.grad_norm = self._parallel.clip(self._clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        made = scaler is None or scaler.get_scale() >= scale
        if self._masters is not None:
            self._masters.copy_to_model()
        self.updates += made
        return made

    def _check_unchanged(self) -> None:
        """Refuse gradients that somebody else has changed, clipped or dropped since the last backward."""
        if self._watch.sees_a_change():
            raise ExactnessError(
                "gradients or parameters were changed between two micro-steps of a window: by clipping, "
                "loss.backward(), model.zero_grad(), the optimizer inside or the like. Give clip_norm to "
                "AccumulatingOptimizer, which clips the whole gradient once, and leave .grad alone until step() "
                "returns True."
            )
