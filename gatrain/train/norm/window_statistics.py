"""BatchNorm's statistics over a window: moments added up exactly, and a normalisation that they are inputs of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Moments:
    """Count, mean and summed squared deviation of each channel, of any number of batches.

    Added up as in Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances"): in fp64, and without the difference of large numbers that E[x^2] - E[x]^2 is.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = torch.zeros(0, dtype=torch.float64)
        """Shape [channels], on the device, as soon as there is any; fp64."""
        self.squares = self.mean
        """Summed squared deviation from the mean."""

    def add(self, x: Tensor) -> None:
        """Add a batch of shape [samples, channels, ...]."""
        var, mean = torch.var_mean(x.detach().to(statistics_dtype(x)), dim=reduced(x), correction=0)
        count = x.numel() / x.shape[1]
        self.merge(count, mean.double(), var.double() * count)

    def merge(self, count: float, mean: Tensor, squares: Tensor) -> None:
        """Add what another one holds."""
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta * delta * (self.count * count / total)
        self.count = total


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics of 16-bit values are computed in, as PyTorch's own kernels do."""
    return torch.float32 if x.element_size() < 4 else x.dtype


def reduced(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


class Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with gradients for mean and variance as for any input.

    Keeps ``x`` for the backward, as BatchNorm does. Not differentiable twice: a gradient of a gradient would miss
    what goes through the statistics.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        inverse = torch.rsqrt(var + eps)  # [channels]
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.has_bias = bias is not None
        scale = inverse if weight is None else inverse * weight
        y = (x.to(mean.dtype) - _across(mean, x)) * _across(scale, x)
        return (y if bias is None else y + _across(bias, x)).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        g = gradient.to(mean.dtype)
        scale = inverse if weight is None else inverse * weight
        total = g.sum(reduced(x))  # [channels]
        along = (g * (x.to(mean.dtype) - _across(mean, x))).sum(reduced(x))  # [channels]
        return (
            (g * _across(scale, x)).to(x.dtype) if ctx.needs_input_grad[0] else None,
            -total * scale,
            -0.5 * along * scale * inverse * inverse,
            None if weight is None else (along * inverse).to(weight.dtype),
            total if ctx.has_bias else None,
            None,
        )


def through_statistics(x: Tensor, mean: Tensor, to_mean: Tensor, to_var: Tensor, count: float) -> Tensor:
    """What the gradients of mean and variance over ``count`` values come to for the values ``x`` among them.

    d mean / dx = 1 / count, d var / dx = 2 (x - mean) / count: the mean inside the variance adds nothing, since
    deviations from it sum to zero.

    Returns:
        Of the shape and dtype of ``x``.
    """
    centred = x.detach().to(mean.dtype) - _across(mean, x)
    return ((_across(to_mean, x) + 2 * _across(to_var, x) * centred) / count).to(x.dtype)


def _across(channels: Tensor, x: Tensor) -> Tensor:
    """[channels] as [1, channels, 1, ...], to go with ``x``."""
    return channels.detach().view(1, -1, *[1] * (x.dim() - 2))
