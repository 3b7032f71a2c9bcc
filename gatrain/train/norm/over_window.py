"""The BatchNorm layers of a model over one window: their order, their statistics, and the running ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.norm.calls import Call, Site
from gatrain.train.norm.leaving import Leave
from gatrain.train.norm.window_statistics import Moments, merged, statistics_dtype
from gatrain.train.step import Step

ORDER = (
    "norm=exact: the model did not compute its BatchNorm layers in the order of the first forward (layers that "
    "depend on the samples, or a mode that changed). Use norm=keep or norm=group."
)


@dataclasses.dataclass
class Statistics:
    """Of one layer over the window."""

    count: float
    mean: Tensor
    """Shape [channels]; fp32, or fp64 where the model computes in it."""
    var: Tensor
    momentum: float
    needs_adjoint: bool
    """Whether the input of a micro-batch depends on what is trained."""
    _inverse: tuple[float, Tensor] | None = None

    def inverse(self, eps: float) -> Tensor:
        """1 / sqrt(var + eps), shape [channels]."""
        if self._inverse is None or self._inverse[0] != eps:
            self._inverse = eps, torch.rsqrt(self.var + eps)
        return self._inverse[1]


class Seen(NamedTuple):
    """What one micro-batch shows of a layer."""

    moments: Moments
    momentum: float
    dtype: torch.dtype
    needs_adjoint: bool

    @classmethod
    def of(cls, call: Call, moments: Moments) -> Seen:
        needs = torch.is_grad_enabled() and call.input.requires_grad
        return cls(moments, call.momentum, statistics_dtype(call.input), needs)


class WindowNorms:
    """
    Args:
        sites: in the order of the forward.
        names: of modules, by the id of their running mean.
    """

    def __init__(self, step: Step, sites: Sequence[Site], names: dict[int, str]) -> None:
        self._step, self.sites, self._names = step, sites, names
        self.found: list[Statistics] = []
        """Of the layers so far."""

    def check_order(self, nth: int, call: Call) -> None:
        """
        Raises:
            ExactnessError: it is not the layer that comes at this place.
        """
        if nth >= len(self.sites) or call.site(self._names) != self.sites[nth]:
            raise ExactnessError(ORDER)

    def add(self, seen: Sequence[Seen], leave: Leave | None = None) -> Leave | None:
        """Mean and variance of the next layer, from what this rank's micro-batches show of it. Collective.

        Args:
            leave: why this rank has nothing to show and never will.

        Returns:
            The same on all ranks: None where statistics were found.

        Raises:
            ConfigError: a window of one value.
        """
        step, own = self._step, merged([each.moments for each in seen]) if seen and leave is None else None
        # all but the moments themselves, which stay on the device
        mine = (0.0, 0.0, torch.float32, False, leave)
        if own is not None:
            mine = own.count, seen[0].momentum, seen[0].dtype, any(each.needs_adjoint for each in seen), None
        every = step.parallel.gather_values(mine)
        if (reason := next((each[-1] for each in every if each[-1] is not None), None)) is not None:
            return reason
        total = own
        if step.ranks.world_size > 1:
            channels = self.sites[len(self.found)].channels
            rows = torch.zeros(len(every), 2, channels, dtype=torch.float64, device=step.device)
            if own is not None:
                rows[step.ranks.rank] = torch.stack([own.mean, own.squares])
            step.ranks.add([rows])
            parts = zip(every, rows, strict=True)
            total = merged([Moments(each[0], *row) for each, row in parts if each[0]])
        if total is None or total.count <= 1:
            raise ConfigError(
                "norm=exact: BatchNorm over a window of one value for each channel. Use norm=group."
            )
        _, momentum, dtype, _, _ = next(each for each in every if each[0])
        self.found.append(
            Statistics(
                total.count,
                total.mean.to(dtype),
                (total.squares / total.count).to(dtype),
                momentum,
                any(each[3] for each in every),
            )
        )
        return None

    def summed(self, nth: int, own: Tensor | None) -> Tensor:
        """What the gradient of layer ``nth``'s statistics is made of, over all ranks. Shape [2, channels].
        Collective.

        Args:
            own: this rank's sum over its micro-batches; None for nothing.
        """
        mean = self.found[nth].mean
        total = mean.new_zeros(2, len(mean)) if own is None else own.clone()
        self._step.ranks.add([total])
        return total

    @torch.no_grad()
    def move_running_statistics(self, model: nn.Module, counts: bool) -> None:
        """As one forward over the whole window moves them, on every rank alike.

        Args:
            counts: also count the batch: where no forward of this rank has.
        """
        for site, found in zip(self.sites, self.found, strict=True):
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
