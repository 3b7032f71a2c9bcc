"""`gatrain.Accumulator`: a window of micro-batches, read ahead, with a context around each of its
micro-steps."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.errors import ConfigError, ExactnessError, PeerFailed
from gatrain.loops.factors import Steps, checked_steps, steps_at
from gatrain.loops.terms import Losses, Used, named_terms
from gatrain.loops.watch import Watch
from gatrain.tasks.base import Batch, Weights, named_weights
from gatrain.train.accumulate import gradient_step
from gatrain.train.main_gradients import MainGradients, MasterWeights, half_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step
from gatrain.train.window_result import WindowResult


class Accumulator:
    """Exact accumulation in a loop of one's own, with the passes in the loop.

    .. code-block:: python

        accumulator = gatrain.Accumulator(model, accumulation_steps=4, weight=lambda batch: len(batch[0]))
        for window in accumulator.windows(loader):
            for x, y in window:
                with window.accumulate(model):
                    window.backward(loss_sum=criterion(model(x), y), weight=len(x))
            optimizer.step()
            optimizer.zero_grad()

    A window is read before its first pass, so that the weight of all of it is known: over its micro-batches
    and over the ranks. At the end of its inner loop the gradient is in ``.grad``, added up over the ranks:
    clip, step, step the schedule and zero the gradients there, once a window. The last window of an epoch is
    as short as the data makes it, and as exact. Ranks may have unequally many batches, or none: all of them
    see equally many windows.

    Args:
        model: on its device; also in DistributedDataParallel, with any of its options but ``static_graph``.
        accumulation_steps: micro-batches of a window on each rank, or a number from each epoch on: ``{0: 4,
            8: 8}``. With them the effective batch changes, and the learning rate does not.
        weight: counts what a batch adds to the denominator, on the host: samples, label tokens, or a mapping
            for several terms.
        term_names: names of the loss terms where ``weight`` returns a mapping.
        scaler: fp16 scaler; call its ``unscale_``, ``step`` and ``update`` once a window.
        master_weights: of a model with 16-bit parameters (`gatrain.MasterWeights`); step those.

    Raises:
        ConfigError: accumulation steps below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accumulation_steps: Steps,
        weight: Callable[[Batch], Weights],
        term_names: Sequence[str] = ("loss",),
        scaler: torch.amp.GradScaler | None = None,
        master_weights: MasterWeights | None = None,
    ) -> None:
        self.model = model
        self.accumulation_steps = checked_steps(accumulation_steps)
        self.empty_windows = 0
        """Windows without any weight on any rank, which were passed over: there is no step to take."""
        self._weight = weight
        self._term_names = term_names
        self._scaler = scaler
        self._masters = master_weights

    def windows(self, batches: Iterable[Batch], epoch: int | None = None) -> Iterator[AccumulationWindow]:
        """The windows of one pass over this rank's batches. Collective: each rank goes through them.

        Args:
            batches: such as a DataLoader: this rank's micro-batches, on the host or the device.
            epoch: from 0, where ``accumulation_steps`` depends on it.

        Raises:
            ExactnessError: a window was left before its end, or gradients are there when one begins.
        """
        steps = steps_at(self.accumulation_steps, epoch)
        source = iter(batches)
        while True:
            window = self._next(source, steps)
            if window is None:
                return
            if window.result.is_empty:
                self.empty_windows += 1
                warnings.warn(
                    "a window without any weight was passed over: there is no step to take.", stacklevel=2
                )
                continue
            yield window
            if not window.is_done:
                raise ExactnessError(
                    f"a window was left after {window.micro_steps} of its {len(window)} micro-batches. Go "
                    f"through all of them before the next window, as in: for batch in window: ..."
                )

    def _next(self, source: Iterator[Batch], steps: int) -> AccumulationWindow | None:
        """Read a window and count it; None where no rank has a batch left. Collective."""
        ranks = Ranks.current()
        read: list[MicroBatch] = []
        failure: Exception | None = None
        try:
            for batch in itertools.islice(source, steps):
                read.append(MicroBatch(batch, named_weights(self._weight(batch))))
        except Exception as error:  # the others wait in the sum below
            read, failure = [], error
        window = LoadedWindow(read, counts={"batches": len(read), "failed": float(failure is not None)})
        step, sums = self._step(ranks)
        totals, counts = step.counts.of(window)
        if sums is not None and (failure is not None or counts["failed"] or not any(totals.values())):
            sums.__exit__(None, None, None)  # no window comes of it: gradients are as they were
        if failure is not None:
            raise failure
        if counts["failed"]:
            raise PeerFailed("another rank failed while it read this window; its own error says why.")
        if not counts["batches"]:
            return None
        return AccumulationWindow(self.model, window, step, totals, counts, sums)

    def _step(self, ranks: Ranks) -> tuple[Step, MainGradients | None]:
        wrapped = any(isinstance(module, DistributedDataParallel) for module in self.model.modules())
        sums = self._masters
        if sums is not None:
            sums.take_changes()
        elif half_parameters(self.model):
            sums = MainGradients(self.model)  # type: ignore[assignment]
        step = gradient_step(
            self.model,
            lambda terms: terms,  # the loop has computed them: its passes are the batches here
            term_names=self._term_names,
            ranks=ranks,
            sync="overlap" if wrapped else "window",
            stage=lambda batch: lambda: batch,
            scaler=self._scaler,
            main_gradients=sums,
        )
        return step, None if sums is self._masters else sums


class AccumulationWindow:
    """One window of an `Accumulator`: iterate over it for this rank's micro-batches, perhaps none."""

    def __init__(
        self,
        model: nn.Module,
        window: LoadedWindow,
        step: Step,
        totals: dict[str, float],
        counts: dict[str, float],
        sums: MainGradients | None,
    ) -> None:
        self.result = WindowResult(totals, counts, {}, step.ranks, step.device)
        """Weights over all ranks; its ``loss()`` is the mean loss, once the window is done."""
        self.micro_steps = 0
        """Micro-batches that were given out."""
        self.is_done = False
        """Whether the whole gradient is in ``.grad``."""
        self._model, self._window, self._step, self._sums = model, window, step, sums
        self._is_open = False
        self._watch = Watch(step.parallel.parameters)

    def __len__(self) -> int:
        return len(self._window.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches; after the last, the gradients are added over the ranks. Collective."""
        if self.micro_steps or self.is_done:
            raise ExactnessError("a window can be gone through once: its gradient is added up as it is.")
        step, totals = self._step, self.result.weight_totals
        step.scale = {name: 1 / total if total else 0.0 for name, total in totals.items()}
        step.parallel.begin_window()
        _refuse_old_gradients(step)
        for micro_batch in self._window.micro_batches:
            self.micro_steps += 1
            yield micro_batch.batch
            self._check_unchanged()
        step.parallel.reduce()
        step.counts.check()
        if self._sums is not None:
            self._sums.__exit__(None, None, None)
        self.result.local_loss_sums = step.counts.take_losses()
        self.is_done = True

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module | None = None) -> Iterator[None]:
        """Around forward and backward of a micro-batch: DistributedDataParallel does not reduce by itself in
        here.

        Args:
            model: that of the `Accumulator`, for readers.

        Raises:
            ConfigError: another model.
        """
        if model is not None and model is not self._model:
            raise ConfigError(
                f"window.accumulate was given another {type(model).__name__} than the Accumulator. Several "
                f"models that are stepped apart need an Accumulator each; trained together, they are one "
                f"nn.Module."
            )
        self._is_open = True
        try:
            with self._step.parallel.micro_step():
                yield
        except Exception as error:
            self._step.parallel.tell_of_failure(error)  # the others wait in the reduction
            raise
        finally:
            self._is_open = False

    def backward(
        self, *, loss_sum: Losses | None = None, mean_loss: Losses | None = None, weight: Used | None = None
    ) -> None:
        """Backward of this micro-batch's share of the window's loss: its sum, divided by the window's whole
        weight.

        Args:
            loss_sum: sum over the samples or tokens, a scalar; several terms by name. Or instead:
            mean_loss: their mean, as most losses return it.
            weight: what the mean divides by, which ``weight(batch)`` has counted beforehand.

        Raises:
            ConfigError: no loss, or no weight; it is called outside of `accumulate`.
            ExactnessError: a loss term that was not counted. At the window's end: another weight than was
            counted.
        """
        if not self._is_open:
            raise ConfigError("call window.backward inside of: with window.accumulate(model): ...")
        terms = named_terms(loss_sum, mean_loss, weight)
        if terms:
            self._step.forward_backward(terms, last=self.micro_steps == len(self))
            self._watch.note()

    def _check_unchanged(self) -> None:
        if self._watch.sees_a_change():
            error = ExactnessError(
                "gradients or parameters were changed between two micro-steps of a window. Clipping, "
                "optimizer.step() and optimizer.zero_grad() belong after the inner loop, once for each window."
            )
            self._step.parallel.tell_of_failure(error)
            raise error

    def loss(self) -> float:
        """Mean loss of the window over all ranks, once it is done. Collective; waits for the device."""
        return self.result.loss()


def _refuse_old_gradients(step: Step) -> None:
    for parameter in step.parallel.parameters:
        gradient = parameter.grad
        if gradient is not None and bool(
            (gradient.to_dense() != 0).any()
        ):  # zeros, of set_to_none=False, are none
            error = ExactnessError(
                "there are gradients already where a window begins: they would be added to it, once for each "
                "rank. Call optimizer.zero_grad() after each optimizer.step()."
            )
            step.parallel.tell_of_failure(error)
            raise error
