"""BatchNorm over the window in one forward and one backward of each micro-batch, all of them together.

Every micro-batch has a thread, and one of all runs at a time (`gatrain.train.turns`). A forward pauses at each
BatchNorm layer until all micro-batches of all ranks have given their moments of it; a backward pauses at each until
all have given their sums, and goes on with the whole gradient of its input. So everything is computed once, and the
activations of all micro-batches of a rank are held at once.

The order: all forwards pause at a layer, then all go on to the next. Autograd runs what is ready in the reverse
order of the forward and, with its own threads switched off, in the thread of the backward; so backwards, too, come
to the layers in one order. Where a micro-batch's loss does not depend on a layer while another's does, the way is
left.

What is the process's and not a thread's is swapped when a thread pauses and goes on: random numbers, attributes of
modules that a forward sets, and buffers, which each part of a forward finds as the one micro-batch would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatrain.errors import ExactnessError, GatrainError
from gatrain.tasks.base import Batch, named_loss_sums
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.norm.buffers import KeptBuffers
from gatrain.train.norm.calls import BatchNormCalls, Call
from gatrain.train.norm.leaving import DISTURBED, HOST_NUMBERS, UNEVEN, Leave, failed_forward, reason_of
from gatrain.train.norm.look import Look
from gatrain.train.norm.over_window import ORDER, Seen, Statistics, WindowNorms
from gatrain.train.norm.swapped import Kept, Swapped
from gatrain.train.norm.window_statistics import NormaliseTogether, moments_of
from gatrain.train.offload import Offloading
from gatrain.train.step import Step, share_of
from gatrain.train.turns import Threads, Turn

SAME = {torch.float64: 1e-10}
"""Relative difference between a micro-batch's loss among the others and alone, with the same kernels."""
SAME_ELSE = 1e-5


class _Forward(NamedTuple):
    """Where a forward pauses."""

    nth: int
    seen: Seen


class _Start(NamedTuple):
    """A forward is done, and its backward has not begun."""


class _Backward(NamedTuple):
    """Where a backward pauses."""

    nth: int
    sums: Tensor
    """Shape [2, channels]."""


@dataclasses.dataclass
class _Micro:
    """A micro-batch under way."""

    batch: Batch
    kept: Kept
    """Of the process, as its forward left it."""
    turn: Turn = dataclasses.field(init=False)
    calls: int = 0
    """BatchNorm computations of its forward so far."""
    share: Tensor | None = None
    """Of the window's loss."""


class Together:
    """One window.

    Args:
        is_first: look whether the micro-batches disturb one another. An error in a forward may come of that.
        draws_on_host: swap Python's and numpy's numbers, too.
        away_bytes: of what is kept for the backwards, to be taken to main memory.
        may_leave: otherwise an error that the other way might not have comes out.
    """

    def __init__(
        self,
        norms: WindowNorms,
        window: LoadedWindow,
        step: Step,
        buffers: KeptBuffers,
        look: Look,
        *,
        is_first: bool,
        draws_on_host: bool,
        away_bytes: float,
        may_leave: bool,
    ) -> None:
        self._norms, self._window, self._step, self._buffers = norms, window, step, buffers
        self._is_first, self._may_leave = is_first, may_leave
        self._away_bytes = away_bytes / max(len(window.micro_batches), 1)
        self._offloading = Offloading(step.model) if away_bytes > 0 else None
        self._swapped = Swapped(step, look, draws_on_host=draws_on_host)
        self._micros: list[_Micro] = []
        self.is_proven = len(window.micro_batches) > 1
        """Whether the window shows that its micro-batches leave one another alone."""
        self._is_forward = True
        gpu = step.device.type == "cuda"
        self._stream = torch.cuda.current_stream(step.device) if gpu else None

    def __call__(self, threads: Threads) -> Leave | None:
        """The gradient in ``.grad``, and buffers as after one forward; the caller moves running statistics.
        Collective.

        Args:
            threads: for the micro-batches.

        Returns:
            None; or why all ranks leave the window half done.
        """
        try:
            return self._forward(threads) or self._backward()
        finally:
            for micro in self._micros:
                micro.turn.stop()
            self._micros.clear()

    # --- all micro-batches ----------------------------------------------------------------------------------

    def _forward(self, threads: Threads) -> Leave | None:
        leave = self._round(self._begun(threads))
        for nth in range(len(self._norms.sites)):
            seen = []
            for micro in self._micros if leave is None else []:
                if not isinstance(place := micro.turn.place, _Forward) or place.nth != nth:
                    raise ExactnessError(ORDER)
                seen.append(place.seen)
            if (leave := self._norms.add(seen, leave)) is not None:
                return leave
            del seen
            leave = self._round(self._micros, self._norms.found[nth])
        return self._agreed(leave or self._disturbed())

    def _backward(self) -> Leave | None:
        self._is_forward = False
        leave = self._round(self._micros)
        for nth in reversed(range(len(self._norms.sites))):
            if not self._norms.found[nth].needs_adjoint:
                continue
            there = [(micro, micro.turn.place) for micro in self._micros if _is_at(micro, nth)]
            own = torch.stack([place.sums for _, place in there]).sum(0) if there else None
            every = self._step.parallel.gather_values((len(there), len(self._micros) - len(there), leave))
            if leaves := [each for _, _, each in every if each is not None]:
                return leaves[0]
            if not any(here for here, _, _ in every):
                continue  # the loss does not depend on this layer
            if any(absent for _, absent, _ in every):
                return UNEVEN
            total = self._norms.summed(nth, own)
            leave = self._round([micro for micro, _ in there], total)
            del there, own, total
        if leave is None and any(micro.turn.place is not None for micro in self._micros):
            raise ExactnessError(ORDER)
        return self._agreed(leave)

    def _agreed(self, leave: Leave | None) -> Leave | None:
        """Of the first rank that has a reason. Collective."""
        return next((each for each in self._step.parallel.gather_values(leave) if each is not None), None)

    def _begun(self, threads: Threads) -> Iterator[_Micro]:
        for k, batch in self._step.batches(self._window):
            micro = _Micro(batch, self._swapped.before)
            del batch
            micro.turn = Turn(functools.partial(self._run, micro, k), threads, k)
            self._micros.append(micro)
            yield micro

    def _round(self, micros: Iterable[_Micro], value: Any = None) -> Leave | None:
        """Each goes on to its next pause, with the buffers that it would find by itself.

        Returns:
            Why the way has to be left.
        """
        count = 0
        try:
            for nth, micro in enumerate(micros):
                self._buffers.undo(nth)
                self._go(micro, value)
                count = nth + 1
                if self._is_first:
                    self._buffers.compare(nth, self._step.model)
        except Exception as error:
            if (leave := self._reason(error)) is None:
                raise
            return leave
        self._buffers.advance(count)
        return None

    def _go(self, micro: _Micro, value: Any) -> None:
        self._swapped.put(micro.kept)
        if micro.turn.go(value) is not None:
            micro.kept = self._swapped.now()

    # --- one micro-batch, in its thread ----------------------------------------------------------------------

    def _run(self, micro: _Micro, k: int) -> None:
        batch, micro.batch = micro.batch, None
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._step.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            # one thread of a GPU would run all backwards, and the first to pause would keep the others from it
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if self._offloading is not None:
                stack.enter_context(self._offloading.forward(self._away_bytes))
            stack.enter_context(
                BatchNormCalls(
                    lambda call: self._normalise(micro, call), lambda share: self._await_start(micro, share)
                )
            )
            self._step.seed(self._window, k)
            if k == len(self._window.micro_batches) - 1:
                self._swapped.note_host()
            self._step.forward_backward(batch)

    def _normalise(self, micro: _Micro, call: Call) -> Tensor:
        """In the place of one BatchNorm computation."""
        nth, micro.calls = micro.calls, micro.calls + 1
        self._norms.check_order(nth, call)
        seen = Seen.of(call, moments_of(call.input))
        found = micro.turn.pause(_Forward(nth, seen))
        return self._normalised(call, found, lambda sums: micro.turn.pause(_Backward(nth, sums)))

    def _normalised(self, call: Call, found: Statistics, meet: Any) -> Tensor:
        anchor = None
        if found.needs_adjoint and not call.input.requires_grad:
            anchor = torch.zeros((), requires_grad=True)
        normalised: Tensor = NormaliseTogether.apply(  # type: ignore[no-untyped-call]
            call.input,
            anchor,
            call.weight,
            call.bias,
            found.mean,
            found.inverse(call.eps),
            found.count,
            meet if found.needs_adjoint else None,
        )
        return normalised

    def _await_start(self, micro: _Micro, share: Tensor) -> None:
        micro.share = share.detach()
        micro.turn.pause(_Start())

    # --- whether they disturb one another --------------------------------------------------------------------

    def _disturbed(self) -> Leave | None:
        """After all forwards: whether one found what was another's. Waits for the device at the first window."""
        if any(not isinstance(micro.turn.place, _Start) for micro in self._micros):
            raise ExactnessError(ORDER)
        if len(self._micros) < 2:
            return None
        if self._swapped.drew_on_host():
            return HOST_NUMBERS
        return self._compare_losses() if self._is_first else None

    def _compare_losses(self) -> Leave | None:
        """Each micro-batch's loss once more by itself, with the statistics that are known now."""
        step, moved = self._step, self._buffers.advanced()
        self._buffers.reset()
        calls = 0

        def normalise(call: Call) -> Tensor:
            nonlocal calls
            nth, calls = calls, calls + 1
            self._norms.check_order(nth, call)
            return self._normalised(call, self._norms.found[nth], lambda sums: sums)

        try:
            for k, batch in step.batches(self._window):
                self._buffers.restore()
                self._swapped.put(self._swapped.before)
                step.seed(self._window, k)
                calls = 0
                with BatchNormCalls(normalise), step.parallel.micro_step(), step.autocast():
                    alone = share_of(named_loss_sums(step.loss_sum(batch)), step.scale).detach()
                together = self._micros[k].share
                assert together is not None
                one, other = float(together), float(alone)
                if not (math.isfinite(one) or math.isfinite(other)):
                    self.is_proven = False  # such a window makes no update
                elif not abs(one - other) <= SAME.get(alone.dtype, SAME_ELSE) * max(abs(one), abs(other)):
                    return DISTURBED
        except Exception as error:
            if (leave := self._reason(error)) is None:
                raise
            return leave
        finally:
            self._buffers.restore()
            self._buffers.put(moved)
            self._buffers.advance(1)
        return None

    def _reason(self, error: Exception) -> Leave | None:
        """Why the other way might do; None for an error that would be one there, too, or may be."""
        if not self._may_leave:
            return None
        leave = reason_of(error)
        if leave is None and self._is_first and self._is_forward and not isinstance(error, GatrainError):
            return failed_forward(error)
        return leave


def _is_at(micro: _Micro, nth: int) -> bool:
    place = micro.turn.place
    return isinstance(place, _Backward) and place.nth == nth
