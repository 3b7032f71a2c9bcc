"""Exact accumulation: a window of micro-batches, on one or many ranks, to the gradient of the whole window.

The target is ``sum_i w_i * grad(l_i) / T`` with T the sum of the weights over all micro-batches of all ranks.
Weights are counted on the host before the first forward, each micro-batch's loss SUM is divided by T, and the
ranks' gradients are added: whatever the split, ragged or empty, the result is the same up to the order of
floating-point sums. The weights that the losses really used are compared with the counts.

This is the plain one of several ways from a window to its gradient; `WindowToGradient` is the seam.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError, PeerFailed, WorkerError
from gatrain.tasks.base import Batch, LossSums, Weights, named_loss_sums, named_weights
from gatrain.train.batches import move_to as move_to
from gatrain.train.main_gradients import MainGradients, MasterWeights, half_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.modules import sparse_parameters, synchronised_norms, unequal_steps_text
from gatrain.train.overlap import OverlappedReduction, share_buffers, without_reduction, wrappers_of
from gatrain.train.ranks import Ranks, layout_of
from gatrain.train.seeding import seed_everything


@dataclass
class WindowResult:
    """What a window came to. The gradients are in ``.grad``, already reduced, the same on every rank."""

    weight_totals: dict[str, float]
    """T of each loss term, over all ranks."""
    counts: dict[str, float]
    """`LoadedWindow.counts`, summed over all ranks."""
    local_loss_sums: dict[str, Tensor]
    """This rank's summed loss of each term: float64 scalars on the device, not yet added over the ranks."""
    ranks: Ranks = field(repr=False)
    device: torch.device = field(repr=False)
    skipped: bool = False
    """True if no update was made because the gradient is not finite, where that is known already."""

    @property
    def is_empty(self) -> bool:
        """True if every weight of the window is zero: there is no gradient and no step to take."""
        return not any(self.weight_totals.values())

    def loss_is_bad(self) -> Tensor:
        """Whether the loss is not finite on any rank: a scalar on the device. Collective.

        Nothing waits for the device. An infinite loss may have a finite gradient, which does not tell of it.
        """
        losses = [total for name, total in self.local_loss_sums.items() if self.weight_totals[name]]
        if losses:
            return self.ranks.any(~torch.isfinite(torch.stack(losses)).all())
        return self.ranks.any(torch.zeros((), dtype=torch.bool, device=self.device))

    def loss(self) -> float:
        """Mean loss of the window over all ranks. Synchronises with the device; every rank must call it."""
        names = list(self.weight_totals)
        local = [float(self.local_loss_sums[name]) if name in self.local_loss_sums else 0.0 for name in names]
        sums = dict(zip(names, self.ranks.sum(local), strict=True))
        return sum(sums[name] / total for name, total in self.weight_totals.items() if total)


class WindowToGradient(Protocol):
    """A way to compute the gradient of a window. All ranks call it together."""

    def __call__(self, window: LoadedWindow) -> WindowResult: ...

    def check_counts(self) -> None: ...


class PlainAccumulation:
    """A backward for each micro-batch into ``.grad``, then one reduction.

    Args:
        model: the module whose parameters get gradients. DistributedDataParallel in it is kept from reducing.
        loss_sum: gives summed losses and the weights used for one batch on the device.
        term_names: names of the loss terms, the same on every rank; needed where a rank may be empty.
        sync: ``window`` runs all micro-steps without communication, lets the ranks agree that nobody failed,
            then adds the gradients once. ``overlap`` adds them bucket by bucket in the last backward. With one
            process both mean the same.
        stage: starts to move a host batch to the device and returns a function that gives it there; called
            one micro-step ahead of its use.
        autocast: makes a context manager for the forward.
        scaler: fp16 loss scaler; one scale for the whole window.
        main_gradients: where the gradients of 16-bit parameters are summed in fp32; None where there are none.
    """

    def __init__(
        self,
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
    ) -> None:
        self._wrappers = wrappers_of(model, ranks)
        ignored = {
            id(parameter)
            for wrapper in self._wrappers
            for name, parameter in wrapper.module.named_parameters()
            if name in wrapper.parameters_to_ignore
        }
        owners = [p for p in model.parameters() if p.requires_grad]
        trained = owners if main_gradients is None else main_gradients.trained
        pairs = [(p, owner) for p, owner in zip(trained, owners, strict=True) if id(owner) not in ignored]
        self._parameters = [parameter for parameter, _ in pairs]
        self._device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._loss_sum = loss_sum
        self._term_names = list(term_names)
        self._ranks = ranks
        sparse = sparse_parameters(model)
        self._sparse = [parameter for parameter, owner in pairs if id(owner) in sparse]
        self._overlap: OverlappedReduction | None = None
        if sync == "overlap" and ranks.world_size > 1:
            places = [place for place, (_, owner) in enumerate(pairs) if id(owner) in sparse]
            owners = [owner for _, owner in pairs]
            self._overlap = OverlappedReduction(ranks, self._parameters, owners, places)
        self._synchronised = synchronised_norms(model, self._device) if ranks.world_size > 1 else []
        self._stage = stage
        self._autocast = autocast
        self._scaler = scaler
        self._checked_once = False
        self._counted: dict[str, float] = {}
        self._used: dict[str, Tensor | float] = {}
        self._loss_sums: dict[str, Tensor] = {}

    def __call__(self, window: LoadedWindow) -> WindowResult:
        """Compute the gradient of one window. Collective: one host sum, the micro-steps, one reduction.

        Raises:
            ExactnessError: the weights used differ from the weights counted (on a GPU after the first window,
                only `check_counts` tells).
        """
        before = dict(self._counted), dict(self._used), dict(self._loss_sums)
        try:
            totals, counts = self._count(window)
            if any(totals.values()):
                share_buffers(self._wrappers, self._ranks)
                self._run_micro_steps(
                    window, {name: 1 / total if total else 0.0 for name, total in totals.items()}
                )
                self.reduce()
                if self._device.type == "cpu" or not self._checked_once:
                    self.check_counts()
                    self._checked_once = True
        except Exception:
            self._counted, self._used, self._loss_sums = before  # those of a window that never came to be
            raise
        sums, self._loss_sums = self._loss_sums, {}
        return WindowResult(totals, counts, sums, self._ranks, self._device)

    def micro_step(
        self, batch: Batch, scale: Mapping[str, float], *, reduce_in_backward: bool = False
    ) -> None:
        """Forward and backward of one batch on the device; gradients add up in ``.grad``.

        Args:
            batch: on the device.
            scale: factor of each loss term, 1/T.
            reduce_in_backward: lets the reduction start in this backward.
        """
        with without_reduction(self._wrappers):  # both passes: the wrapper reads its flag in the forward
            with self._autocast():
                terms = named_loss_sums(self._loss_sum(batch))
            unknown = [name for name in terms if name not in scale]
            if unknown:
                raise ExactnessError(
                    f"loss_sum returned the term {unknown[0]!r}, which weight() did not count."
                )
            loss = torch.stack([total * scale[name] for name, (total, _) in terms.items()]).sum()
            overlap = self._overlap if reduce_in_backward else None
            with overlap.during_backward() if overlap is not None else contextlib.nullcontext():
                (self._scaler.scale(loss) if self._scaler else loss).backward()  # type: ignore[no-untyped-call]
        for parameter in self._sparse:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse and gradient._nnz() > len(gradient):
                parameter.grad = gradient.coalesce()  # the same row again and again: no larger than the table
        with torch.no_grad():
            for name, (total, weight) in terms.items():
                self._loss_sums[name] = total.detach().double() + self._loss_sums.get(name, 0.0)
                used = weight.detach().double() if isinstance(weight, Tensor) else float(weight)
                self._used[name] = used + self._used.get(name, 0.0)

    def reduce(self) -> None:
        """Add the gradients over the ranks after they agreed that nobody failed. Collective."""
        if self._overlap is not None:
            self._overlap.finish()
        elif self._ranks.world_size > 1:
            failed, *layouts = self._ranks.sum([0.0, *map(layout_of, self._parameters)])
            if failed:
                error = PeerFailed("another rank failed in this window; its own error says why.")
                error.before_update = True
                raise error
            self._ranks.reduce_gradients(self._parameters, layouts)

    def _tell_of_failure(self) -> None:
        """The others wait in `reduce`: let them know, so that all leave the window together."""
        if self._overlap is not None:
            for parameter in self._parameters:
                parameter.grad = None  # nothing of this window is of use; the buckets need the memory
            try:
                self._overlap.finish(failed=True)
            except Exception as error:  # now this process must end, or the others wait for it for ever
                raise WorkerError(f"{type(error).__name__}: {error}") from error
        else:
            self._ranks.sum([1.0, *(0.0 for _ in self._parameters)])

    def take_sums(self) -> tuple[Tensor | float, Tensor | float]:
        """Summed losses and weights used, over all terms, since the last window; forgets both. For trials."""
        losses, weights = sum(self._loss_sums.values()), sum(self._used.values())
        self._loss_sums, self._used = {}, {}
        return losses, weights

    @contextlib.contextmanager
    def rehearsing(self, fp32: bool = False) -> Iterator[None]:
        """Micro-steps in here count for no window and leave no gradient; ``fp32`` leaves autocast off."""
        kept = self._counted, self._used, self._loss_sums, self._autocast
        self._counted, self._used, self._loss_sums = {}, {}, {}
        if fp32:
            self._autocast = contextlib.nullcontext
        try:
            yield
        finally:
            self._counted, self._used, self._loss_sums, self._autocast = kept
            for parameter in self._parameters:
                parameter.grad = None

    def check_counts(self) -> None:
        """Compare the weights counted on the host with those that the losses used, since the last check.

        Synchronises with the device. Not collective.

        Raises:
            ExactnessError: they differ; the message names both.
        """
        counted, self._counted = self._counted, {}
        used, self._used = self._used, {}
        for name in counted.keys() | used.keys():
            before, after = counted.get(name, 0.0), float(used.get(name, 0.0))
            if not abs(before - after) <= 1e-6 * abs(before) * (not before.is_integer()):
                raise ExactnessError(
                    f"weight() counted {before:g} for the loss term {name!r}, but loss_sum() used {after:g}. "
                    "Both must apply the same mask (mind shifted labels and ignored positions); "
                    "the step would be wrong by that factor."
                )

    def _count(self, window: LoadedWindow) -> tuple[dict[str, float], dict[str, float]]:
        """Sum weights and counts: one small collective on the host."""
        local = dict.fromkeys(self._term_names, 0.0)
        for micro_batch in window.micro_batches:
            for name, weight in micro_batch.weights.items():
                if name not in local:
                    raise ExactnessError(f"weight() counted an unknown loss term {name!r}.")
                local[name] += float(weight)
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
            for name, weight in local.items():
                self._counted[name] = self._counted.get(name, 0.0) + weight
        return totals, dict(zip(window.counts, summed[len(local) :], strict=True))

    def _run_micro_steps(self, window: LoadedWindow, scale: Mapping[str, float]) -> None:
        last = len(window.micro_batches) - 1
        try:
            if window.failure is not None:
                raise window.failure
            staged = [self._stage(micro_batch.batch) for micro_batch in window.micro_batches[:1]]
            for index in range(len(window.micro_batches)):
                batch = staged.pop()()
                if index < last:  # started now, so that the copy overlaps this micro-step
                    staged.append(self._stage(window.micro_batches[index + 1].batch))
                if (seed := window.seed_of(index)) is not None:
                    seed_everything(*seed)
                self.micro_step(batch, scale, reduce_in_backward=index == last)
        except Exception as error:
            if self._ranks.world_size > 1:
                self._tell_of_failure()
            error.before_update = True  # type: ignore[attr-defined]
            raise


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
    ranks = Ranks.current()
    strategy = PlainAccumulation(
        model,
        lambda batch: loss_sum(model, batch),
        term_names=term_names,
        ranks=ranks,
        sync="overlap" if wrappers_of(model, ranks) else "window",
        stage=lambda batch: lambda: move_to(batch, device),
        autocast=autocast,
        scaler=scaler,
        main_gradients=main_gradients,
    )
    return strategy(LoadedWindow(listed))
