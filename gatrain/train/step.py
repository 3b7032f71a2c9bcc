"""The step: one window in, one update of the parameters out. Nothing here waits for the device.

The target is ``sum_i w_i * grad(l_i) / T``, with T the sum of the weights over all micro-batches of all ranks.
T is counted on the host before the first forward, each micro-batch's loss SUM is divided by it, and the ranks'
gradients are added: whatever the split, ragged or empty, the result is the same up to the order of floating-point
sums. The weights that the losses really used are compared with T.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError
from gatrain.tasks.base import Batch, LossSum, LossSums, Task, named_loss_sums
from gatrain.train.counts import Counts
from gatrain.train.dropout import RandomNumbers
from gatrain.train.gradient import GradientStrategy, Update
from gatrain.train.guard import Guard
from gatrain.train.loss_scale import try_lower_scales
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import synchronised_norms
from gatrain.train.parallel import Replicated
from gatrain.train.part_norms import PartNorms
from gatrain.train.window_result import WindowResult


class Step:
    """From a window to the updated parameters, and the means that a `GradientStrategy` computes with.

    Args:
        model: on its device, as ``parallel.wrap`` gave it.
        loss_sum: summed losses and the weights used, for one batch on the device.
        term_names: names of the loss terms, the same on every rank; needed where a rank may be empty.
        parallel: set up for the model.
        strategy: the way from the window to the gradient.
        stage: starts to move a host batch to the device; what it returns gives the batch there.
        autocast: makes a context manager for the forward.
        scaler: fp16 loss scaler; one scale for the whole window.
        task: for strategies that compute other passes than ``loss_sum``.
        method: gives a method ``(model, batch)`` of the task by its name, as a function of the batch.
        random: the random numbers of its forwards, set up for the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_sum: Callable[[Batch], LossSums],
        *,
        term_names: Sequence[str],
        parallel: Replicated,
        strategy: GradientStrategy,
        stage: Callable[[Batch], Callable[[], Batch]],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        task: Task | None = None,
        method: Callable[[str], Callable[..., Any]] | None = None,
        random: RandomNumbers | None = None,
    ) -> None:
        self.model, self.task, self.loss_sum = model, task, loss_sum
        self.method = method or (lambda name: functools.partial(getattr(task, name), model))
        self.parallel, self.ranks, self.strategy = parallel, parallel.ranks, strategy
        self.random = random or RandomNumbers()
        self.stage, self.autocast, self.scaler = stage, self.random.around(autocast), scaler
        self.device = parallel.parameters[0].device if parallel.parameters else torch.device("cpu")
        norms = synchronised_norms(model, self.device) if self.ranks.world_size > 1 else []
        self.counts = Counts(term_names, self.ranks, norms)
        self.part_norms = PartNorms(parallel, scaler)
        self.guard: Guard | None = None
        self.number = 0
        """Updates made before the one in hand, which set the learning rate and what a loss is told."""
        self.totals: Mapping[str, float] = {}
        """T of each loss term, for the window in hand."""
        self.scale: Mapping[str, float] = {}
        """1/T of each loss term; 0 for one that no sample has."""
        self.before_micro_step: list[Callable[[LoadedWindow, int], None]] = []
        """Called in `seed`, with the window and the micro-step's index."""
        self._is_checked = False
        self._before = self.counts.noted()
        self._was_updated = False

    def updates_with(
        self,
        optimizer: torch.optim.Optimizer,
        masters: MasterWeights,
        guard: Guard,
        set_rates: Callable[[int], None],
        clip: Callable[[Replicated], Tensor],
        thaw: Callable[[int], None] | None = None,
    ) -> None:
        """What `update` needs; the library form, verify and predictions make no updates."""
        self.optimizer, self.masters, self.guard = optimizer, masters, guard
        self._set_rates, self._clip, self._thaw = set_rates, clip, thaw

    # --- from the window to the updated parameters --------------------------------------------------------

    def __call__(self, window: LoadedWindow, number: int) -> tuple[WindowResult, Tensor]:
        """One optimizer step. Collective.

        Args:
            window: this rank's part of it.
            number: updates made before.

        Returns:
            The window's result and the norm of its gradient before clipping, a scalar on the device. A window
            whose weights are all zero takes no step and has norm 0; one whose gradient is not finite changes
            neither parameters nor optimizer nor buffers.
        """
        self.number = number
        if self._thaw is not None:
            self._thaw(number)  # parameters that are trained from a later step on
        result, update = self.attempt(window)
        if not update.made and self.scaler is not None:  # fp16: the gradient may fit at a lower loss scale
            result, update = try_lower_scales(self, window, result, update)
        result.skipped, result.metrics = not update.made, update.metrics
        self.number += update.made and not result.is_empty
        return result, update.norm

    def attempt(self, window: LoadedWindow) -> tuple[WindowResult, Update]:
        """The window's gradient and the update with it, or everything as before. Collective."""
        assert self.guard is not None
        self.guard.keep_buffers()
        self.parallel.drop_gradients()  # those that a hook of a person's own may have left behind
        result, update = self.gradient(window)
        if result.is_empty:
            return result, Update(torch.zeros((), device=self.device), made=True)
        update = update or self.update(result.loss_is_bad())
        if not update.made:
            self.guard.restore_buffers()
        return result, update

    def gradient(self, window: LoadedWindow) -> tuple[WindowResult, Update | None]:
        """The exact gradient of the window in ``.grad``, reduced, the same on every rank. Collective.

        Raises:
            ExactnessError: the weights used differ from those counted (on a GPU `Counts.check` tells it later).
        """
        self._before, self._was_updated, update = self.counts.noted(), False, None
        self.part_norms.begin(window)
        try:
            passes = self.strategy.passes(self)
            totals, counts = self.counts.of(window, passes)  # {term: T}: one host sum over the ranks
            self.totals = totals
            if any(totals.values()):
                self.scale = {name: 1 / total if total else 0.0 for name, total in totals.items()}
                self.parallel.begin_window()
                try:
                    if window.failure is not None:
                        raise window.failure
                    update = self.strategy(window, self)  # .grad: this rank's part of the sum over samples
                    self.part_norms.before_reduction()
                except Exception as error:
                    self.parallel.tell_of_failure(error)  # the others wait in the reduction
                    error.before_update = not self._was_updated  # type: ignore[attr-defined]
                    raise
                if update is None:
                    self.strategy.reduce(self)  # one host sum: nobody failed; then the all-reduce of .grad
                if self.device.type == "cpu" or not self._is_checked:
                    self.counts.check()
                    self._is_checked = True
        except Exception:
            self.counts.put_back(self._before)  # those of a window that never came to be
            raise
        losses = self.counts.take_losses()  # {term: sum over this rank's samples}, scalars
        used = {name: total * passes.get(name, 1) for name, total in totals.items()}
        part = self.part_norms.found()
        return WindowResult(used, counts, losses, self.ranks, self.device, part=part), update

    def forward_backward(
        self,
        batch: Batch,
        scale: Mapping[str, float] | None = None,
        *,
        last: bool = False,
        loss_sum: Callable[[Batch], LossSums] | None = None,
    ) -> None:
        """One micro-batch on the device; its gradients add up in ``.grad``.

        Args:
            batch: on the device.
            scale: factor of each loss term; `scale`, 1/T, by default.
            last: of this rank's window: lets the reduction start in this backward.
            loss_sum: in place of the task's own.
        """
        scale = self.scale if scale is None else scale
        with self.parallel.micro_step():  # around both passes: no module reduces by itself
            with self.autocast():
                # {term: (sum over samples [], weight used)}
                terms = named_loss_sums((loss_sum or self.loss_sum)(batch))
            self.backward(share_of(terms, scale), last=last)
        self.counts.add(terms)
        self.part_norms.after_micro_step()

    def backward(self, share: Tensor, gradient: Tensor | None = None, *, last: bool = False) -> None:
        """Backward of this rank's share of the window's loss, a scalar: one pass of any kind.

        Args:
            gradient: of the window's loss with respect to ``share``, of any shape then, from earlier backwards: it
                has the loss scale in it.
        """
        with self.parallel.backward(last):
            share = share if self.scaler is None or gradient is not None else self.scaler.scale(share)
            share.backward(gradient)  # .grad += the gradient of this share
        self.parallel.settle()

    def update(self, loss_is_bad: Tensor | None = None) -> Update:
        """Unscale, clip the whole reduced gradient, step the optimizer, drop the gradients."""
        self.begin_update()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.strategy.clip(self, self._clip)  # [], before clipping; the same on every rank
        assert self.guard is not None
        made = self.guard.step(norm, loss_is_bad)  # where norm and loss are finite; all ranks decide alike
        if self.scaler is not None:
            self.scaler.update(None if made else self.scaler.get_scale())  # without an update it stays
        self.masters.copy_to_model()
        self.parallel.drop_gradients()
        return Update(norm, made)

    def begin_update(self) -> None:
        """Rates and weights as the update needs them. From here on the state before the window may be gone."""
        self._was_updated = True
        self._set_rates(self.number)
        self.masters.take_changes()

    def nothing_updated(self) -> None:
        """A strategy has taken its updates back, and leaves the rest of the window uncomputed."""
        self._was_updated = False
        self.counts.leave_unchecked(self._before)

    # --- further means of strategies ----------------------------------------------------------------------

    def batches(self, window: LoadedWindow) -> Iterator[tuple[int, Batch]]:
        """Index and batch on the device of each micro-batch; the next one is copied while one is in use."""
        micro_batches = window.micro_batches
        staged = [self.stage(micro_batch.batch) for micro_batch in micro_batches[:1]]
        for k in range(len(micro_batches)):
            ready = staged.pop()()
            if k + 1 < len(micro_batches):
                staged.append(self.stage(micro_batches[k + 1].batch))
            yield k, ready
            del ready

    def seed(self, window: LoadedWindow, k: int) -> None:
        """Set the random generators to the numbers of micro-step k, the same ones however often it is computed."""
        for listener in self.before_micro_step:
            listener(window, k)
        self.random.seed(window, k)

    def reset(self) -> None:
        """Forget what the window has come to so far: gradients, sums, what its forwards wrote into buffers."""
        self.parallel.drop_gradients()
        self.counts.forget_passes(self._before)
        if self.guard is not None:
            self.guard.restore_buffers()


def share_of(terms: Mapping[str, LossSum], scale: Mapping[str, float]) -> Tensor:
    """The sum over the loss terms of sum / T: a scalar with graph."""
    if not terms:
        raise ExactnessError(
            "the loss of a micro-batch is an empty mapping. Return every loss term each time: for one that no "
            "sample of the micro-batch has a weight for, a sum of zero with a graph and the weight 0, such as "
            "(outputs.sum() * 0, 0)."
        )
    for name in terms:
        if name not in scale:
            raise ExactnessError(f"loss_sum returned the term {name!r}, which weight() did not count.")
    shares = [total * scale[name] for name, (total, _) in terms.items()]
    return shares[0] if len(shares) == 1 else torch.stack(shares).sum()
