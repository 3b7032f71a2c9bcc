"""BatchNorm over the window in the memory of one micro-batch: passes for each layer.

For BatchNorm layers 1 to L in the order of the forward, with x_l a layer's input and mu_l, var_l its mean and
variance over all micro-batches of all ranks (the adjoint method, with statistics as leaves of the graph):

1. Statistics. For l = 1..L every micro-batch goes forward up to layer l, without a graph, and the moments of x_l
   are added up: layers before it have theirs already.
2. Main pass. Every micro-batch forward and backward, the statistics being leaf tensors. That gives parameters what
   does not go through statistics, and each leaf a gradient.
3. Adjoint. For l = L..1 the gradient of layer l's statistics is complete, since all that depends on them comes
   after it. Every micro-batch goes forward up to layer l once more, and backward from x_l with what that gradient
   comes to for it (`through_statistics`): parameters get the rest, and the statistics of the layers before theirs.

In all L forwards up to a layer, 1 + L of them with a backward, of L/2 of the model on average. Random numbers are
set anew for each pass, and buffers are as before the window at each forward, as they are over the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatrain.errors import ExactnessError
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.norm.buffers import KeptBuffers
from gatrain.train.norm.calls import BatchNormCalls, Call
from gatrain.train.norm.over_window import ORDER, Seen, WindowNorms
from gatrain.train.norm.window_statistics import Normalise, moments_of, through_statistics
from gatrain.train.step import Step


class _Reached(BaseException):
    """Ends a forward at the layer that a pass is for. No Exception: no model's code takes it for an error."""


class LayerByLayer:
    """One window.

    Args:
        compares: see to it that no buffer depends on samples.
    """

    def __init__(
        self, norms: WindowNorms, window: LoadedWindow, step: Step, buffers: KeptBuffers, *, compares: bool
    ) -> None:
        self._norms, self._window, self._step, self._buffers = norms, window, step, buffers
        self._compares = compares
        self._calls = 0
        """BatchNorm computations of the forward in hand."""
        self._until: int | None = None
        """The layer that the pass in hand ends at; None for a whole forward."""
        self._reached: Call | None = None

    def __call__(self) -> None:
        """The gradient in ``.grad``, and buffers as after one forward; the caller moves running statistics.
        Collective."""
        layers = range(len(self._norms.sites))
        try:
            with BatchNormCalls(self._compute):
                for nth in layers:
                    self._add_statistics(nth)
                self._main_pass()
                after = self._buffers.changed()
                for nth in reversed(layers):
                    self._adjoint_pass(nth)
        finally:
            self._buffers.restore()
            self._reached = None
        self._buffers.put(after)

    def _add_statistics(self, nth: int) -> None:
        """Mean and variance of a layer over the window. Collective."""
        seen = []
        with torch.no_grad():
            for k, batch in self._step.batches(self._window):
                call = self._up_to(nth, batch, k)
                seen.append(Seen.of(call, moments_of(call.input)))
        self._norms.add(seen)
        found = self._norms.found[nth]
        found.mean.requires_grad_()
        found.var.requires_grad_()

    def _main_pass(self) -> None:
        self._until = None
        for k, batch in self._step.batches(self._window):
            self._begin(k)
            self._step.forward_backward(batch)
            if self._calls < len(self._norms.found):
                raise ExactnessError(ORDER)
            if self._compares:
                self._buffers.compare(k, self._step.model)

    def _adjoint_pass(self, nth: int) -> None:
        """The part of the gradient that goes through a layer's statistics. Collective."""
        found, own = self._norms.found[nth], None
        if found.mean.grad is not None and found.var.grad is not None:
            own = torch.stack([found.mean.grad, found.var.grad])
        every = self._step.parallel.gather_values((own is not None, found.needs_adjoint))
        if not any(has for has, _ in every) or not any(needs for _, needs in every):
            return  # the loss does not depend on this layer, or the layer on nothing that is trained
        to_mean, to_var = self._norms.summed(nth, own)
        for k, batch in self._step.batches(self._window):
            with self._step.parallel.micro_step():
                x = self._up_to(nth, batch, k).input
                if x.requires_grad:
                    self._step.backward(x, through_statistics(x, found.mean, to_mean, to_var, found.count))
            del x

    # --- one forward --------------------------------------------------------------------------------------

    def _up_to(self, nth: int, batch: Any, k: int) -> Call:
        """What layer ``nth`` is given in the forward of micro-batch ``k``, which ends there."""
        self._until = nth
        self._begin(k)
        try:
            with self._step.parallel.micro_step(), self._step.autocast():
                self._step.loss_sum(batch)
        except _Reached:
            call, self._reached = self._reached, None
            assert call is not None
            return call
        raise ExactnessError(ORDER)

    def _begin(self, k: int) -> None:
        self._buffers.restore()
        self._calls, self._reached = 0, None
        self._step.seed(self._window, k)

    def _compute(self, call: Call) -> Tensor:
        """In the place of one BatchNorm computation."""
        nth, self._calls = self._calls, self._calls + 1
        self._norms.check_order(nth, call)
        if nth == self._until:
            self._reached = call
            raise _Reached
        found = self._norms.found[nth]
        found.needs_adjoint |= call.input.requires_grad
        normalised: Tensor = Normalise.apply(  # type: ignore[no-untyped-call]
            call.input, found.mean, found.var, call.weight, call.bias, call.eps
        )
        return normalised
