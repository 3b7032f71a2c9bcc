"""BatchNorm over the whole window, forward and backward: exact, in the memory of one micro-batch.

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

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatrain.config import RunConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.gradient import StepCost
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import batch_norms
from gatrain.train.norm.buffers import KeptBuffers
from gatrain.train.norm.calls import BatchNormCalls, Call, Site, owners_of
from gatrain.train.norm.window_statistics import Moments, Normalise, statistics_dtype, through_statistics
from gatrain.train.seeding import derive_seed

if TYPE_CHECKING:
    from gatrain.train.step import Step


class _Reached(BaseException):
    """Ends a forward at the layer that a pass is for. No Exception: no model's code takes it for an error."""


@dataclasses.dataclass
class _Statistics:
    """Of one layer over the window: leaves of the graphs of all micro-batches."""

    count: float
    mean: Tensor
    """Shape [channels]; fp32, or fp64 where the model computes in it."""
    var: Tensor
    momentum: float
    needs_adjoint: bool = False
    """Whether its input depends on what is trained."""


class ExactNorm(Plain):
    """The gradient of BatchNorm over all samples of the window, whatever micro-batches and ranks they are on."""

    exact = (
        "the gradient of BatchNorm over the whole window, and its running statistics, for any loss that is a sum "
        "over samples beside it and any model that computes its BatchNorm layers in one order"
    )
    needs_whole_window = True
    overlaps = False
    adds_micro_batches = False
    normalises_window = True

    def __init__(self) -> None:
        self._sites: list[Site] | None = None
        self._found: list[_Statistics] = []
        self._names: dict[int, str] = {}
        self._is_compared = False
        self._calls = 0
        """BatchNorm computations of the forward in hand."""
        self._until: int | None = None
        """The layer that the pass in hand ends at; None for a whole forward."""
        self._reached: Call | None = None

    # --- before the run -----------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        if config.compile is True:
            raise ConfigError(
                "norm=exact ends most forwards at a BatchNorm layer, which compiled code cannot: leave compile out."
            )
        if config.precision == "fp16":
            raise ConfigError(_NO_FP16)
        if config.checkpointing not in ("auto", "none"):
            raise ConfigError(
                f"norm=exact computes forwards anew by itself and does not go with checkpointing="
                f"{config.checkpointing}: leave checkpointing out; a smaller batch.micro needs less memory."
            )

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self._sites, self._is_compared = None, False
        if any(isinstance(module, DistributedDataParallel) for module in step.model.modules()):
            raise ConfigError(
                "norm=exact ends forwards early, which DistributedDataParallel cannot: give the model itself."
            )
        if step.scaler is not None:
            raise ConfigError(_NO_FP16)

    def cost_of(self, model: nn.Module) -> StepCost:
        return cost_of(len(batch_norms(model)))

    # --- one window ---------------------------------------------------------------------------------------

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        if step.ranks.world_size == 1 and len(window.micro_batches) == 1:
            super().__call__(window, step)  # all samples are in one batch: BatchNorm sees them by itself
            return
        if window.seed is None:  # every pass must draw the same numbers
            drawn = int(torch.randint(2**62, ()))
            window = dataclasses.replace(window, seed=(derive_seed(drawn),))
        self._names = owners_of(step.model)
        buffers = KeptBuffers(step.model)
        try:
            with BatchNormCalls(self._compute):
                sites = self._find_sites(window, step, buffers)
                self._found = []
                for nth in range(len(sites)):
                    self._add_statistics(nth, sites, window, step, buffers)
                self._main_pass(window, step, buffers)
                after = buffers.changed()
                for nth in reversed(range(len(sites))):
                    self._adjoint_pass(nth, window, step, buffers)
        finally:
            buffers.restore()
            self._reached = None
        buffers.put(after)
        self._move_running_statistics(step.model, sites, counts=not window.micro_batches)
        self._found = []

    def _find_sites(self, window: LoadedWindow, step: Step, buffers: KeptBuffers) -> list[Site]:
        """The layers, from a forward of one micro-batch at the first window. Collective then."""
        if self._sites is not None:
            return self._sites
        seen: list[Site] = []
        if window.micro_batches:
            self._found, self._until = [], None
            with torch.no_grad(), BatchNormCalls(lambda call: self._note(call, seen)):
                _, batch = next(step.batches(window))
                self._forward(batch, window, 0, step, buffers)
        step.parallel.agree(False)  # whoever failed leaves with all others
        every = [
            found for found in step.ranks.gather(seen if window.micro_batches else None) if found is not None
        ]
        if any(found != every[0] for found in every):
            raise ExactnessError(f"norm=exact: {_ORDER}")
        self._sites = every[0]
        return self._sites

    def _note(self, call: Call, seen: list[Site]) -> Tensor:
        seen.append(call.site(self._names))
        return _normalise(call, *_of_nothing(call))

    def _add_statistics(
        self, nth: int, sites: list[Site], window: LoadedWindow, step: Step, buffers: KeptBuffers
    ) -> None:
        """Mean and variance of a layer over the window. Collective."""
        moments, momentum, dtype = Moments(), 0.0, torch.float32
        with torch.no_grad():
            for k, batch in step.batches(window):
                call = self._up_to(nth, batch, window, k, step, buffers)
                moments.add(call.input)
                momentum, dtype = call.momentum, statistics_dtype(call.input)
        total = moments
        if step.ranks.world_size > 1:
            total = Moments()
            rows = [torch.stack([moments.mean, moments.squares])] if moments.count else []
            parts = step.parallel.gather(_stacked(rows, sites[nth].channels, torch.float64, step.device))
            # a rank without micro-batches knows neither
            heads = step.ranks.gather((moments.count, momentum, dtype))
            for part, (count, its_momentum, its_dtype) in zip(parts, heads, strict=True):
                if count:
                    total.merge(count, *part[0])
                    momentum, dtype = its_momentum, its_dtype
        if total.count <= 1:
            raise ConfigError(
                "norm=exact: BatchNorm over a window of one value for each channel. Use norm=group."
            )
        self._found.append(
            _Statistics(
                total.count,
                total.mean.to(dtype).requires_grad_(),
                (total.squares / total.count).to(dtype).requires_grad_(),
                momentum,
            )
        )

    def _main_pass(self, window: LoadedWindow, step: Step, buffers: KeptBuffers) -> None:
        self._until = None
        for k, batch in step.batches(window):
            self._begin(window, k, step, buffers)
            step.forward_backward(batch)
            if self._calls < len(self._found):
                raise ExactnessError(f"norm=exact: {_ORDER}")
            if not self._is_compared:
                buffers.compare(k, step.model)
        self._is_compared = True

    def _adjoint_pass(self, nth: int, window: LoadedWindow, step: Step, buffers: KeptBuffers) -> None:
        """The part of the gradient that goes through a layer's statistics. Collective."""
        found = self._found[nth]
        rows = []
        if found.mean.grad is not None and found.var.grad is not None:
            rows = [torch.stack([found.mean.grad, found.var.grad])]
        own = _stacked(rows, len(found.mean), found.mean.dtype, step.device)
        every = torch.cat(step.parallel.gather(own))  # [ranks that have one, 2, channels]
        if not len(every) or not found.needs_adjoint:
            return  # the loss does not depend on this layer, or the layer on nothing that is trained
        to_mean, to_var = every.sum(dim=0)
        for k, batch in step.batches(window):
            with step.parallel.micro_step():
                x = self._up_to(nth, batch, window, k, step, buffers).input
                if x.requires_grad:
                    step.backward(x, through_statistics(x, found.mean, to_mean, to_var, found.count))
            del x

    # --- one forward --------------------------------------------------------------------------------------

    def _up_to(
        self, nth: int, batch: Any, window: LoadedWindow, k: int, step: Step, buffers: KeptBuffers
    ) -> Call:
        """What layer ``nth`` is given in the forward of micro-batch ``k``, which ends there."""
        self._until = nth
        try:
            self._forward(batch, window, k, step, buffers)
        except _Reached:
            call, self._reached = self._reached, None
            assert call is not None
            return call
        raise ExactnessError(f"norm=exact: {_ORDER}")

    def _forward(self, batch: Any, window: LoadedWindow, k: int, step: Step, buffers: KeptBuffers) -> None:
        self._begin(window, k, step, buffers)
        with step.parallel.micro_step(), step.autocast():
            step.loss_sum(batch)

    def _begin(self, window: LoadedWindow, k: int, step: Step, buffers: KeptBuffers) -> None:
        buffers.restore()
        self._calls, self._reached = 0, None
        step.seed(window, k)

    def _compute(self, call: Call) -> Tensor:
        """In the place of one BatchNorm computation."""
        nth, self._calls = self._calls, self._calls + 1
        sites = self._sites or []
        if nth >= len(sites) or call.site(self._names) != sites[nth]:
            raise ExactnessError(f"norm=exact: {_ORDER}")
        if nth == self._until:
            self._reached = call
            raise _Reached
        found = self._found[nth]
        found.needs_adjoint |= call.input.requires_grad
        return _normalise(call, found.mean, found.var)

    @torch.no_grad()
    def _move_running_statistics(self, model: nn.Module, sites: list[Site], counts: bool) -> None:
        """As one forward over the whole window moves them, on every rank alike.

        Args:
            counts: also count the batch: where no forward of this rank has.
        """
        for site, found in zip(sites, self._found, strict=True):
            if site.name is None:
                continue
            module, m = model.get_submodule(site.name), found.momentum
            mean, var = module._buffers["running_mean"], module._buffers["running_var"]
            assert mean is not None
            assert var is not None
            unbiased = found.var * (found.count / (found.count - 1))
            mean.mul_(1 - m).add_(found.mean.to(mean.dtype), alpha=m)
            var.mul_(1 - m).add_(unbiased.to(var.dtype), alpha=m)
            tracked = module._buffers.get("num_batches_tracked")
            if counts and tracked is not None:
                tracked.add_(1)


def cost_of(layers: int) -> StepCost:
    """Of a model with this many layers, which are as if spread evenly: a forward up to a layer is half of one."""
    return StepCost(micro_steps=1 + layers / 2, forwards=layers / 2)


def _normalise(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    normalised: Tensor = Normalise.apply(call.input, mean, var, call.weight, call.bias, call.eps)  # type: ignore[no-untyped-call]
    return normalised


def _stacked(rows: list[Tensor], channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Shape [0 or 1, 2, channels]: what a rank has to tell, or that it has nothing."""
    return torch.stack(rows) if rows else torch.zeros(0, 2, channels, dtype=dtype, device=device)


def _of_nothing(call: Call) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1, to find the layers with."""
    dtype = statistics_dtype(call.input)
    channels, device = call.input.shape[1], call.input.device
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


_NO_FP16 = "norm=exact is not tested with the loss scale of fp16. Use precision=bf16 or precision=fp32."
_ORDER = (
    "the model did not compute its BatchNorm layers in the order of the first forward (layers that depend on the "
    "samples, or a mode that changed). Use norm=keep or norm=group."
)
