"""The step: one window in, one update of the parameters out. Nothing here waits for the device.

`Engine.step` is what training runs; its parts (`micro_step`, `reduce`, `update`) are what trials time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.config import OptimizerConfig, ScheduleConfig
from gatrain.errors import PeerFailed
from gatrain.plan import StepSettings
from gatrain.tasks.base import Batch, LossSum, LossSums, Task, named_loss_sums
from gatrain.train.accumulate import PlainAccumulation, WindowResult, WindowToGradient
from gatrain.train.batches import move_to, moves_itself, tensors_of
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.compiling import CompiledLossSum
from gatrain.train.guard import Guard
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.modules import sparse_parameters
from gatrain.train.optimizer import (
    build_optimizer,
    check_takes_sparse,
    clip_with_sparse,
    dense_parts,
    exempt_from_decay,
    learning_rate,
    make_state,
)
from gatrain.train.precision import LOWEST_SCALE, autocast_for, forbid_tf32, scaler_for
from gatrain.train.ranks import Ranks
from gatrain.train.seeding import kept_random_state, seed_everything

INFINITY = float("inf")
_RETRIES = 3
"""Times that a window whose fp16 gradient overflows is computed again; each has a scale found fit before."""


@dataclass(frozen=True)
class Rehearsal:
    """What one batch alone came to."""

    loss_sum: float
    norm: float
    """Of its gradient; in fp16 times the loss scale."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss_sum) and math.isfinite(self.norm)


@dataclass(frozen=True)
class StepClock:
    """What the learning rate of a step depends on."""

    schedule: ScheduleConfig
    total_steps: int
    effective_batch: int


class Engine:
    """Model, optimizer and the way from a window to its gradient, on this rank's device.

    Args:
        task: the loss.
        model: on the device, the same on every rank. Wrapped here, never replaced: its state dict keeps its names.
        settings: precision, checkpointing, compile, sync.
        optimizer_config: which optimizer.
        clock: for the learning rate; None leaves it at its peak.
        nonfinite: ``skip`` learns at once, on the host, whether a window is finite (see `guard`).
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
    ) -> None:
        self.task = task
        self.model = model
        self.device = device
        self.ranks = ranks
        self.settings = settings
        self._config = optimizer_config
        self._clock = clock
        self._autocast = autocast_for(settings.precision, device)
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        forbid_tf32(settings.precision)
        apply_checkpointing(model, settings.checkpointing)
        ranks.broadcast_from_first([p.data for p in model.parameters()])
        self.share_buffers()
        self.masters = MasterWeights(model)
        self.scaler = scaler_for("fp16" if self.masters.has_fp16 else settings.precision, device)
        self._parameters = self.masters.trained
        check_takes_sparse(optimizer_config, model)
        self._sparse = sparse_parameters(model)
        self.exempt_from_decay = exempt_from_decay(model) if optimizer_config.weight_decay else {}
        """Parameters that the model itself wants without weight decay, by name."""
        spared = [self.masters.of(p) for p in self.exempt_from_decay.values()]
        self.optimizer = build_optimizer(
            optimizer_config, self._parameters, spared, sparse=bool(self._sparse)
        )
        make_state(self.optimizer)
        self.masters.copy_to_model()  # the same weights: they were stepped with rate zero
        self._loss_sum = self._loss_function(model)
        self._plain = PlainAccumulation(
            model,
            self._loss_sum,
            term_names=task.loss_terms,
            ranks=ranks,
            sync=settings.sync,
            stage=self.stage,
            autocast=self._autocast,
            scaler=self.scaler,
            main_gradients=self.masters,
        )
        self.gradient: WindowToGradient = self._plain
        at_once = nonfinite == "skip" or self.scaler is not None or device.type == "cpu"
        self.guard = Guard(model, self.optimizer, device, at_once=at_once)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward in the engine's precision."""
        return self._autocast()

    def _loss_function(self, model: nn.Module) -> Callable[[Batch], LossSums]:
        def loss_sum(batch: Batch) -> LossSums:
            return self.task.loss_sum(model, batch)

        if not self.settings.compile:
            return loss_sum
        return CompiledLossSum(self.task, model)

    def stage(self, batch: Batch) -> Callable[[], Batch]:
        """Start copying a host batch to the device; the returned function gives it to the current stream."""
        if self._copies is None or moves_itself(batch):
            return lambda: move_to(batch, self.device)
        with torch.cuda.stream(self._copies):
            moved = move_to(batch, self.device)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)

        def ready() -> Batch:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            for tensor in tensors_of(moved):
                tensor.record_stream(stream)  # its memory must not be reused for copies before then
            return moved

        return ready

    def to_device(self, batch: Batch) -> Batch:
        """Copy a host batch to the device, for use on the current stream."""
        return self.stage(batch)()

    def step(self, window: LoadedWindow, step: int) -> tuple[WindowResult, Tensor]:
        """One optimizer step. Collective.

        In fp16 a window whose gradient overflows is computed again at a lower loss scale: none is lost to it.

        Args:
            window: this rank's part of it.
            step: updates made before, which set the learning rate.

        Returns:
            The window's result and the norm of its gradient before clipping, a scalar on the device. A window
            whose weights are all zero takes no step and has norm 0; one whose gradient is not finite changes
            neither parameters nor optimizer nor buffers.
        """
        before: dict[str, Any] | None = None
        for attempt in range(1 + _RETRIES):
            self.guard.keep_buffers()
            result = self.gradient(window)
            if result.is_empty:
                return result, torch.zeros((), device=self.device)
            norm, made = self._close(step, result.loss_is_bad())
            if made:
                return result, norm
            self.guard.restore_buffers()
            if self.scaler is None:
                break
            before = before or self.scaler.state_dict()
            if attempt == _RETRIES or not self._lower_scale(window, result):
                self.scaler.load_state_dict(before)  # it was not the scale
                break
        result.skipped = True
        return result, norm

    def update(self, step: int) -> Tensor:
        """Unscale, clip the whole reduced gradient, step the optimizer, drop the gradients.

        Returns:
            Norm of the gradient before clipping: a scalar on the device, the same on every rank.
        """
        norm, made = self._close(step)
        if self.scaler and not made:
            self.scaler.set_to(self.scaler.get_scale() / 2)
        return norm

    def _close(self, step: int, loss_is_bad: Tensor | None = None) -> tuple[Tensor, bool]:
        """`update` without a word on the loss scale: (norm, whether an update was made as far as is known)."""
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.masters.take_changes()
        for parameter in self._parameters:
            # a function of the user's own that is sparse: told of by no module, so the optimizer may not take it
            if parameter.grad is not None and parameter.grad.is_sparse and id(parameter) not in self._sparse:
                parameter.grad = parameter.grad.to_dense()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        limit = self._config.clip_norm
        if self._sparse:
            norm = clip_with_sparse(self._parameters, limit)
        else:
            norm = nn.utils.clip_grad_norm_(self._parameters, INFINITY if limit is None else limit)
        made = self.guard.step(norm, loss_is_bad)
        if self.scaler:
            self.scaler.update() if made else self.scaler.forget_window()
        self.masters.copy_to_model()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, made

    def _lower_scale(self, window: LoadedWindow, result: WindowResult) -> bool:
        """Find a loss scale at which no micro-batch of the window overflows. Collective; rare.

        Micro-batch by micro-batch, so that a scale far too high costs some micro-steps and not some windows.

        Returns:
            Whether the window is worth another try.
        """
        assert self.scaler is not None
        before = scale = self.scaler.get_scale()
        if not math.isfinite(result.loss()):
            return False  # the forward knows no loss scale
        factor = {name: 1 / total if total else 0.0 for name, total in result.weight_totals.items()}
        index, more = 0, True
        while more:
            micro = window.micro_batches[index] if index < len(window.micro_batches) else None
            finite, failure = True, None
            try:
                if micro is not None:
                    finite = self.rehearse(micro.batch, factor, window.seed_of(index)).is_finite
            except Exception as error:
                failure = error
            more_here = index + 1 < len(window.micro_batches)
            failed, overflowed, more_anywhere = self.ranks.sum([failure is not None, not finite, more_here])
            if failure is not None:
                raise failure
            if failed:
                raise PeerFailed("another rank failed in this window; its own error says why.")
            if not overflowed:
                index, more = index + 1, more_anywhere > 0
                continue
            scale /= 2
            if scale < LOWEST_SCALE:
                return False
            self.scaler.set_to(scale)
        if scale == before:  # only the sum overflowed
            self.scaler.set_to(scale / 2)
        return True

    def rehearse(
        self,
        batch: Batch,
        scale: Mapping[str, float],
        seed: tuple[int, ...] | None = None,
        *,
        fp32: bool = False,
    ) -> Rehearsal:
        """Forward and backward of one host batch, on this rank alone, that leave nothing behind.

        Waits for the device.

        Args:
            batch: on the host.
            scale: as for `micro_step`.
            seed: see `LoadedWindow.seed_of`.
            fp32: without autocast.
        """
        self.guard.keep_buffers()
        try:
            with self._plain.rehearsing(fp32), kept_random_state():
                if seed is not None:
                    seed_everything(*seed)
                self._plain.micro_step(self.to_device(batch), scale)
                loss = float(self._plain.take_sums()[0])
                gradients = dense_parts([p.grad for p in self._parameters if p.grad is not None])
                return Rehearsal(loss, float(nn.utils.get_total_norm(gradients)))
        finally:
            self.guard.restore_buffers()

    @contextlib.contextmanager
    def lowest_loss_scale(self) -> Iterator[None]:
        """In here nothing overflows in fp16 because of the loss scale."""
        before = self.scaler.state_dict() if self.scaler else {}
        try:
            if self.scaler:
                self.scaler.set_to(LOWEST_SCALE)
            yield
        finally:
            if self.scaler:
                self.scaler.load_state_dict(before)

    def parameters_used(self, micro_batch: MicroBatch, seed: int) -> dict[str, bool]:
        """Which trained parameters this micro-batch gives a gradient, by name; it is dropped. For trials."""
        scale = {name: 1 / weight if weight else 0.0 for name, weight in micro_batch.weights.items()}
        seed_everything(seed)
        self.micro_step(self.to_device(micro_batch.batch), scale)
        self._plain.take_sums()
        used = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained = self.masters.of(parameter)
                used[name] = trained.grad is not None
                trained.grad = None
        return used

    def new_notices(self) -> list[str]:
        """What compilation has to tell since the last call."""
        if not isinstance(self._loss_sum, CompiledLossSum):
            return []
        found, self._loss_sum.notices = self._loss_sum.notices, []
        return found

    def newly_thawed(self) -> list[str]:
        """Names of parameters that were frozen when the engine was made and want a gradient now; each is told once.

        Host work alone: nothing waits for the device.
        """
        names = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        for name in names:
            del self._frozen[name]
        return names

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0)."""
        if self._clock is None:
            return self._config.lr
        return learning_rate(
            self._clock.schedule,
            self._config.lr,
            step=step,
            total_steps=self._clock.total_steps,
            effective_batch=self._clock.effective_batch,
        )

    def forward(self, batch: Batch) -> None:
        """The forward of one host batch as in training, uncompiled, with random numbers that nobody misses."""
        with kept_random_state(), self._autocast():
            self.task.loss_sum(self.model, self.to_device(batch))

    def micro_step(self, batch: Batch, scale: Mapping[str, float]) -> None:
        """Forward and backward of one batch on the device, without any reduction."""
        self._plain.micro_step(batch, scale)

    def reduce(self) -> None:
        """Let the ranks agree, then add their gradients. Collective."""
        self._plain.reduce()

    def last_loss_sums(self) -> tuple[Tensor, Tensor]:
        """Summed loss and weight of the micro-steps since the last call: float64 scalars."""
        losses, weights = self._plain.take_sums()
        return torch.as_tensor(losses, dtype=torch.float64), torch.as_tensor(weights, dtype=torch.float64)

    def evaluate(self, batch: Batch) -> tuple[dict[str, LossSum], dict[str, LossSum]]:
        """Loss sums and further metric sums of one batch on the device; no gradients, evaluation mode."""
        with evaluating(self.model), torch.no_grad(), self._autocast():
            losses = named_loss_sums(self._loss_sum(batch))
            return losses, dict(self.task.eval_metrics(self.model, batch))

    def showcase(self) -> str | None:
        """What the task has to show of the model (a generated sample, say). One rank alone may call it."""
        with evaluating(self.model), torch.no_grad():
            return self.task.showcase(self.model, self.device)

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics). Collective."""
        self.ranks.broadcast_from_first(buffer for buffer in self.model.buffers())


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
