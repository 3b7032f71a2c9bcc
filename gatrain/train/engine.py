"""A run's model, optimizer and step on one rank's device: what is set up once. The step itself is in `step`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.config import REDUCE_OVERHEAD, OptimizerConfig, ScheduleConfig
from gatrain.plan import StepSettings
from gatrain.tasks.base import (
    Batch,
    LossSum,
    LossSums,
    Task,
    asks_for_step,
    loss_sum_at,
    named_loss_sums,
    phases_of,
    terms_of,
)
from gatrain.train.accumulate import gradient_step
from gatrain.train.batch_scaling import BatchScaling
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.clipping import Clipping
from gatrain.train.compiling import CompiledLossSum
from gatrain.train.dropout import RandomNumbers
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.kept import StrategyState
from gatrain.train.groups import Thawing
from gatrain.train.guard import Guard
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.micro_batches import MicroBatch
from gatrain.train.modules import sparse_parameters
from gatrain.train.offload import forward_context
from gatrain.train.optimizer import check_takes_sparse
from gatrain.train.optimizer_state import prime
from gatrain.train.parallel import Replicated
from gatrain.train.phased_optimizer import MakerOf, PhasedOptimizer, build_for, groupings, joined
from gatrain.train.precision import autocast_for, forbid_tf32, scaler_for
from gatrain.train.ranks import Ranks
from gatrain.train.schedule import Factor, Span, factor
from gatrain.train.seeding import kept_random_state
from gatrain.train.staging import Staging


@dataclass(frozen=True)
class StepClock:
    """What the learning rate of a step depends on."""

    schedule: ScheduleConfig
    total_steps: int
    effective_batch: int
    own: Factor | None = None
    """A schedule of the user's own."""
    phases: Mapping[str, StepClock] = field(default_factory=dict)
    """Of phases with a schedule of their own."""
    stages: tuple[tuple[int, int], ...] = ()
    """(first step, effective batch) of each stage, where the effective batch changes."""

    def factor(self, step: int) -> float:
        """Of the peak rate, at optimizer step ``step`` (from 0)."""
        if self.own is not None:
            return self.own(step)
        return factor(self.schedule, Span(self.total_steps, self.effective_batch, self.stages), step)


class Engine:
    """Model, optimizer and `Step` on this rank's device.

    Args:
        task: the loss.
        model: on the device, the same on every rank. Wrapped here, never replaced: its state dict keeps its names.
        settings: precision, checkpointing, compile, sync.
        optimizer_config: which optimizer.
        clock: for the learning rate and what is thawed later; None leaves the rate at its peak and thaws all.
        nonfinite: ``skip`` learns at once, on the host, whether a window is finite (see `guard`).
        strategy: the way from a window to its gradient.
        parallel: how the model lies on the ranks.
        maker_of: for an optimizer of the user's own, what makes it.
        batch_rule: what another effective batch does to the optimizer, and the one that its values are for.
        random: where the random numbers of forwards come from.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        settings: StepSettings,
        optimizer_config: OptimizerConfig,
        ranks: Ranks,
        device: torch.device,
        clock: StepClock | None = None,
        nonfinite: str = "stop",
        *,
        strategy: GradientStrategy | None = None,
        parallel: Replicated | None = None,
        maker_of: MakerOf = lambda config: None,
        batch_rule: tuple[str, int] = ("none", 1),
        random: RandomNumbers | None = None,
    ) -> None:
        parallel, random = parallel or Replicated(), random or RandomNumbers()
        self.task, self.device, self.ranks, self.settings = task, device, ranks, settings
        self._clock = clock
        # what is trained now or later wants a gradient from here on: state, buckets and masters are made for it
        grouped = groupings(task, optimizer_config, model)
        grouping = joined(each for _, each in grouped.values())
        self._parameters = dict(model.named_parameters())
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        forbid_tf32(settings.precision)
        random.set_up(model)
        apply_checkpointing(model, settings.checkpointing)
        self.model = model = parallel.wrap(model, ranks)
        self.masters = MasterWeights(model)
        self.scaler = scaler_for("fp16" if self.masters.has_fp16 else settings.precision, device)
        for each, _ in grouped.values():
            check_takes_sparse(each, model)
        sparse = sparse_parameters(model)
        self.built = build_for(
            task, optimizer_config, grouped, self.masters.of, sparse=sparse, maker_of=maker_of
        )
        self.optimizer = self.built.optimizer
        if self.built.behaviour.can_be_primed:
            prime(self.optimizer)
        self.scaling = BatchScaling(*batch_rule, self.optimizer, self.built.lr)
        named = dict(model.named_parameters())
        self._thawing = Thawing([(named[name], at) for name, at in grouping.thaw_at.items()])
        self.masters.copy_to_model()  # the same weights: they were stepped with rate zero
        at_once = nonfinite == "skip" or self.scaler is not None or device.type == "cpu"
        self.guard = Guard(model, self.optimizer, device, at_once=at_once)
        self.reserved: Tensor | None = None
        """In trials: as much memory as hooks will hold."""
        self._compiled = None
        if settings.compile and not task.phases:
            self._compiled = CompiledLossSum(task, model, replays=settings.compile == REDUCE_OVERHEAD)
        self._methods: dict[str, Callable[..., Any]] = {}
        self._loss_sum = self._loss_function()
        self._autocast = autocast_for(settings.precision, device)
        self.step = gradient_step(
            model,
            self._loss_sum,
            term_names=terms_of(task),
            ranks=ranks,
            sync=settings.sync,
            stage=Staging(device),
            autocast=forward_context(settings.checkpointing, model, self._autocast),
            scaler=self.scaler,
            main_gradients=self.masters,
            strategy=strategy,
            parallel=parallel,
            task=task,
            method=self._method,
            random=random,
        )
        self.step.updates_with(
            self.optimizer,
            self.masters,
            self.guard,
            self._set_rates,
            Clipping(grouping.clips, model, self.masters.of, sparse),
            thaw=self._thawing.before_step if clock is not None else None,
        )
        self.step.strategy.set_up(self.step, self.optimizer)
        self.strategy_state = StrategyState(self.step.strategy)

    def _loss_function(self) -> Callable[[Batch], LossSums]:
        compiled, task, model = self._compiled, self.task, self.model
        if task.phases:  # all of them at once, as they are evaluated; the strategy computes one at a time
            return self.loss_sum
        if not asks_for_step(task):
            return compiled or (lambda batch: task.loss_sum(model, batch))
        if compiled is not None:
            return lambda batch: compiled(batch, step=self.step.number)
        return self.loss_sum

    def _method(self, name: str) -> Callable[..., Any]:
        """A method ``(model, batch)`` of the task, compiled if the run is: for gradient strategies."""
        if name not in self._methods:
            model, plain = self.model, getattr(self.task, name)
            self._methods[name] = (
                CompiledLossSum(self.task, model, method=name)
                if self.settings.compile
                else functools.partial(plain, model)
            )
        return self._methods[name]

    def loss_sum(self, batch: Batch) -> LossSums:
        """The task's loss sums of one batch on the device, uncompiled."""
        return loss_sum_at(self.task, self.model, batch, self.step.number)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward in the engine's precision."""
        return self.step.autocast()

    def to_device(self, batch: Batch) -> Batch:
        """Copy a host batch to the device, for use on the current stream."""
        return self.step.stage(batch)()

    # --- what trials time, part by part -------------------------------------------------------------------

    def micro_step(self, batch: Batch, scale: Mapping[str, float]) -> None:
        """Forward and backward of one batch on the device, without any reduction."""
        self.step.strategy.micro_step(self.step, batch, scale)

    def forward_pass(self, batch: Batch) -> None:
        """A forward of one batch on the device, without a graph: what `StepCost.forwards` counts."""
        with torch.no_grad(), self.autocast():
            self._loss_sum(batch)

    def reduce(self) -> None:
        """Let the ranks agree, then add their gradients. Collective."""
        self.step.strategy.reduce(self.step)

    def update(self, number: int) -> Tensor:
        """Unscale, clip the whole reduced gradient, step the optimizer, drop the gradients.

        Returns:
            Norm of the gradient before clipping: a scalar on the device, the same on every rank.
        """
        self.step.number = number
        update = self.step.update()
        if self.scaler and not update.made:
            self.scaler.set_to(self.scaler.get_scale() / 2)
        return update.norm

    def last_loss_sums(self) -> tuple[Tensor, Tensor]:
        """Summed loss and weight of the micro-steps since the last call: float64 scalars."""
        return self.step.counts.take()

    def parameters_used(self, micro_batch: MicroBatch, seed: int) -> dict[str, bool]:
        """Which trained parameters this micro-batch gives a gradient, by name; it is dropped. For trials."""
        scale = {name: 1 / weight if weight else 0.0 for name, weight in micro_batch.weights.items()}
        self.step.random.start((seed,), None)
        self.step.forward_backward(self.to_device(micro_batch.batch), scale)
        self.step.counts.take()
        used = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained = self.masters.of(parameter)
                used[name] = trained.grad is not None
                trained.grad = None
        return used

    def new_notices(self) -> list[str]:
        """What compilation and the gradient strategy have to tell since the last call. Waits for the device."""
        found = self.step.strategy.news()
        for each in (self._compiled, *self._methods.values()):
            if isinstance(each, CompiledLossSum):
                found += each.notices
                each.notices = []
        return found

    def newly_thawed(self) -> list[str]:
        """Names of parameters that were frozen when the engine was made and want a gradient now; each is told once.

        Host work alone: nothing waits for the device.
        """
        names = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        for name in names:
            del self._frozen[name]
        return names

    def replaced(self) -> str | None:
        """Name of a parameter in whose place the model has another one by now, which nobody trains."""
        named = self.model.named_parameters()
        return next((name for name, p in named if self._parameters.get(name) is not p), None)

    def _set_rates(self, number: int) -> None:
        if isinstance(self.optimizer, PhasedOptimizer):
            for name, part in self.optimizer.parts.items():
                part.set_rate(part.lr * self._factor(number, name))
        else:
            self.built.set_rate(self.learning_rate(number))

    def _factor(self, step: int, phase: str = "") -> float:
        """Of the peak rate, at optimizer step ``step`` (from 0)."""
        clock = None if self._clock is None else self._clock.phases.get(phase, self._clock)
        return self.scaling.lr_factor * (1.0 if clock is None else clock.factor(step))

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0), at the effective batch that `scaling` is set to.

        Of several phases it is that of the first.
        """
        return self.built.lr * self._factor(step, next(iter(phases_of(self.task)), ""))

    def forward(self, batch: Batch) -> None:
        """The forward of one host batch as in training, uncompiled, with random numbers that nobody misses."""
        with kept_random_state(), self._autocast():
            self.loss_sum(self.to_device(batch))

    def evaluate(self, batch: Batch) -> tuple[dict[str, LossSum], dict[str, LossSum]]:
        """Loss sums and further metric sums of one batch on the device; no gradients, evaluation mode."""
        with self.evaluating():
            losses = named_loss_sums(self._loss_sum(batch))
            return losses, dict(self.task.eval_metrics(self.model, batch))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of a forward for evaluation: no gradients, the run's precision, the model in evaluation mode."""
        with evaluating(self.model), torch.no_grad(), self._autocast():  # which knows no keys
            yield

    def showcase(self) -> str | None:
        """What the task has to show of the model (a generated sample, say). One rank alone may call it."""
        with evaluating(self.model), torch.no_grad():
            return self.task.showcase(self.model, self.device)

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics). Collective."""
        self.step.parallel.share_buffers(self.model)


class evaluating:
    """Context in which a model is in evaluation mode; restores each module's own mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [module for module in self._model.modules() if module.training]
        self._model.eval()

    def __exit__(self, *exception: Any) -> None:
        for module in self._training:
            module.training = True
