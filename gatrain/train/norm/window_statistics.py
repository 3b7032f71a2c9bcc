"""BatchNorm's statistics over a window: moments added up exactly, and normalisations that they are inputs of.

On a GPU the work of each layer is done by the kernels that SyncBatchNorm is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Moments:
    """Of each channel of a batch, or of several."""

    count: float
    """Values of each channel."""
    mean: Tensor
    """Shape [channels], on the device."""
    squares: Tensor
    """Shape [channels]: summed squared deviation from the mean."""


def moments_of(x: Tensor) -> Moments:
    """Of a batch of shape [samples, channels, ...], in `statistics_dtype`."""
    x = x.detach()
    count = x.numel() / x.shape[1]
    if _has_kernels(x):
        mean, inverse = torch.batch_norm_stats(_dense(x), 0.0)  # 1 / sqrt(var), and 0 where var is
        return Moments(count, mean, torch.where(inverse == 0, 0.0, inverse.pow(-2)) * count)
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), dim=reduced(x), correction=0)
    return Moments(count, mean, var * count)


def merged(parts: Sequence[Moments]) -> Moments:
    """Of all batches as one, in fp64.

    As in Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances"): without the difference of large numbers that E[x^2] - E[x]^2 is.
    """
    counts = tuple(part.count for part in parts)
    means = torch.stack([part.mean for part in parts]).double()  # [parts, channels]
    within = torch.stack([part.squares for part in parts]).double().sum(0)
    each: Tensor | float = counts[0]
    if len(set(counts)) > 1:
        each = _column(counts, means.device)
    mean = (means * each).sum(0) / sum(counts)
    between = ((means - mean).square() * each).sum(0)
    return Moments(sum(counts), mean, within + between)


@functools.lru_cache(maxsize=256)
def _column(counts: tuple[float, ...], device: torch.device) -> Tensor:
    """[parts, 1]: kept, since making it waits for the device."""
    return torch.tensor(counts, dtype=torch.float64, device=device).unsqueeze(1)


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
        return _normalised(x, mean, inverse, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        total, along, to_weight = _sums(gradient, x, mean, inverse, weight)
        to_bias = total if ctx.has_bias else None
        scale = inverse if weight is None else inverse * weight
        to_x = (gradient.to(mean.dtype) * _across(scale, x)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return to_x, -total * scale, -0.5 * along * scale * inverse * inverse, to_weight, to_bias, None


class NormaliseTogether(torch.autograd.Function):
    """The same with mean and variance as constants, and the gradient through them added where it is known: the
    backward asks for it and waits until all micro-batches have given their part.

    Args of its `apply`:
        x: shape [samples, channels, ...].
        anchor: requires a gradient, and gets none, where the input of another micro-batch does and this one's not.
        mean: shape [channels].
        inverse: shape [channels]: 1 / sqrt(var + eps).
        count: values of each channel in the window.
        meet: takes this micro-batch's sums of g and of g (x - mean), shape [2, channels], and gives the window's;
            None where no input requires a gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        count: float,
        meet: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, inverse, weight)
        ctx.count, ctx.meet, ctx.has_bias = count, meet, bias is not None
        return _normalised(x, mean, inverse, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        total, along, to_weight = _sums(gradient, x, mean, inverse, weight)
        to_x, to_bias = None, total if ctx.has_bias else None
        if ctx.meet is not None:
            total, along = ctx.meet(torch.stack([total, along]))
            if ctx.needs_input_grad[0]:
                to_x = _to_input(gradient, x, mean, inverse, weight, total, along, ctx.count)
        return to_x, None, to_weight, to_bias, None, None, None, None


def through_statistics(x: Tensor, mean: Tensor, to_mean: Tensor, to_var: Tensor, count: float) -> Tensor:
    """What the gradients of mean and variance over ``count`` values come to for the values ``x`` among them.

    d mean / dx = 1 / count, d var / dx = 2 (x - mean) / count: the mean inside the variance adds nothing, since
    deviations from it sum to zero.

    Returns:
        Of the shape and dtype of ``x``.
    """
    centred = x.detach().to(mean.dtype) - _across(mean, x)
    return ((_across(to_mean, x) + 2 * _across(to_var, x) * centred) / count).to(x.dtype)


# --- the arithmetic of a layer --------------------------------------------------------------------------------


def _normalised(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if _has_kernels(x):
        y: Tensor = torch.batch_norm_elemt(
            _dense(x), _like(weight, mean), _like(bias, mean), mean, inverse, 0.0
        )
        return y
    scale = inverse if weight is None else inverse * weight
    y = (x.to(mean.dtype) - _across(mean, x)) * _across(scale, x)
    return (y if bias is None else y + _across(bias, x)).to(x.dtype)


def _sums(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over all but channels of g and of g (x - mean), and what the weight gets. Shapes [channels]."""
    if _has_kernels(x):
        total, along, _, _ = torch.batch_norm_backward_reduce(
            _dense(gradient), _dense(x), mean, inverse, _like(weight, mean), True, False, False
        )
    else:
        g = gradient.to(mean.dtype)
        total = g.sum(reduced(x))
        along = (g * (x.to(mean.dtype) - _across(mean, x))).sum(reduced(x))
    return total, along, None if weight is None else (along * inverse).to(weight.dtype)


def _to_input(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    total: Tensor,
    along: Tensor,
    count: float,
) -> Tensor:
    """The gradient of ``x``, by itself and through mean and variance.

    Args:
        total: sum of g over the window, shape [channels].
        along: sum of g (x - mean) over the window, shape [channels].
    """
    if _has_kernels(x) and count < 2**31:
        counts = torch.full((1,), int(count), dtype=torch.int32, device=x.device)
        to_x: Tensor = torch.batch_norm_backward_elemt(
            _dense(gradient), _dense(x), mean, inverse, _like(weight, mean), total, along, counts
        )
        return to_x
    scale = inverse if weight is None else inverse * weight
    centred = x.to(mean.dtype) - _across(mean, x)
    through = _across(total / count, x) + centred * _across(along * inverse * inverse / count, x)
    return ((gradient.to(mean.dtype) - through) * _across(scale, x)).to(x.dtype)


def _has_kernels(x: Tensor) -> bool:
    """Whether the kernels of SyncBatchNorm are there for it. They keep statistics of 16 bits in fp32, too."""
    return x.is_cuda and x.numel() > 0


def _dense(x: Tensor) -> Tensor:
    if any(x.is_contiguous(memory_format=layout) for layout in (torch.channels_last, torch.channels_last_3d)):
        return x
    return x.contiguous()


def _like(weight: Tensor | None, mean: Tensor) -> Tensor | None:
    return None if weight is None else weight.detach().to(mean.dtype).contiguous()


def _across(channels: Tensor, x: Tensor) -> Tensor:
    """[channels] as [1, channels, 1, ...], to go with ``x``."""
    return channels.detach().view(1, -1, *[1] * (x.dim() - 2))
