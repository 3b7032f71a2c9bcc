"""torch's dropout functions, replaced once in a process that asks for keyed dropout.

Whoever looks one up in ``torch.nn.functional`` gets these: modules of torch, transformers, timm and torchvision,
and users' forwards. Where no keyed forward is under way they call the original.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from gatrain.train.dropout.keyed import KeyedDropout

NAMES = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "scaled_dot_product_attention",
)  # fmt: skip
ALPHA = -1.7580993408473766
"""What SELU gives for minus infinity (Klambauer et al. 2017, https://arxiv.org/abs/1706.02515)."""


class Current:
    """Whose forward is under way in this process, and whose was the last one."""

    draws: KeyedDropout | None = None
    last: KeyedDropout | None = None


current = Current()
_original: dict[str, Any] = {}


def install() -> None:
    """Put the functions in place, once; there they stay."""
    if _original:
        return
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()  # Dynamo notes torch's own functions: it must not take these for them
    for name in NAMES:
        _original[name] = getattr(F, name)
    for name in NAMES:
        setattr(F, name, globals()[name])


def drawing() -> KeyedDropout | None:
    """Whose keyed numbers are to be drawn here; None for torch's."""
    if current.draws is not None or torch.compiler.is_compiling():
        return current.draws
    if current.last is not None and in_backward():
        current.last.refuse_recomputation()
    return None


def replayed() -> AbstractContextManager[Any]:
    """For a part of the forward that begins now: the context in which it is computed again."""
    return contextlib.nullcontext() if current.draws is None else current.draws.replay()


def in_backward() -> bool:
    """Whether a backward is under way in this thread: what a forward computes there is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _draws(p: float, training: bool) -> bool:
    return training and 0.0 < p <= 1.0  # anything else is torch's to answer


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    draws = drawing() if _draws(p, training) else None
    if draws is None:
        return _original["dropout"](input, p, training, inplace)  # type: ignore[no-any-return]
    return _scaled(input, draws.mask(input, input.shape, p), p, inplace)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _channels("dropout1d", input, p, training, inplace)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _channels("dropout2d", input, p, training, inplace)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _channels("dropout3d", input, p, training, inplace)


def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    draws = drawing() if _draws(p, training) else None
    if draws is None:
        return _original["alpha_dropout"](input, p, training, inplace)  # type: ignore[no-any-return]
    return _alpha(input, draws.mask(input, input.shape, p), p, inplace)


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    draws = drawing() if _draws(p, training) else None
    if draws is None:
        return _original["feature_alpha_dropout"](input, p, training, inplace)  # type: ignore[no-any-return]
    return _alpha(input, draws.channel_mask(input, p), p, inplace)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    draws = drawing() if _draws(dropout_p, True) else None
    if draws is None:
        return _original["scaled_dot_product_attention"](  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # the fused kernels draw masks of their own, so the matrix is made: [b, heads, queries, keys]
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    shares = scores.softmax(-1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shares = shares.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)  # as torch does
    kept = _scaled(shares, draws.mask(shares, shares.shape, dropout_p, batch_dim=0), dropout_p, False)
    return kept.to(value.dtype) @ value


def _channels(name: str, input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    draws = drawing() if _draws(p, training) else None
    if draws is None:
        return _original[name](input, p, training, inplace)  # type: ignore[no-any-return]
    return _scaled(input, draws.channel_mask(input, p), p, inplace)


def _scaled(input: Tensor, mask: Tensor, p: float, inplace: bool) -> Tensor:
    scale = 1 / (1 - p) if p < 1 else 0.0
    if inplace:
        return input.mul_(mask * scale)
    return input * mask * scale  # the backward keeps the mask: one byte for each element


def _alpha(input: Tensor, mask: Tensor, p: float, inplace: bool) -> Tensor:
    if p >= 1:
        return input.mul_(0) if inplace else input * 0
    factor = ((1 - p) * (1 + p * ALPHA**2)) ** -0.5
    dropped = torch.where(mask, 0.0, factor * ALPHA).to(input.dtype) - factor * ALPHA * p
    if inplace:
        return input.mul_(mask).mul_(factor).add_(dropped)
    result: Tensor = input * mask * factor + dropped
    return result
