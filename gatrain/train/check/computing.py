"""In which numbers a forward computes here, and what stays out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gatrain.tasks.base import Batch

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative to the losses' size, by the lowest precision that the forward used, where nothing sharper can be
computed. The same numbers added in another order differ by about 1e-7 to 1e-5 in fp32 and by 3e-3 in bf16."""


def by_precision(dtype: torch.dtype) -> float:
    """Sorts the lowest precision first."""
    return -TOLERANCE[dtype]


class Precisions(TorchDispatchMode):
    """Notes whether anything is computed with 16 bits: then rounding explains more."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowest: torch.dtype | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.bfloat16, torch.float16):
            self.lowest = min(self.lowest or result.dtype, result.dtype, key=by_precision)
        return result


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module, batch: Batch, device: torch.device) -> Iterator[Batch]:
    """Compute in fp32 or fp64: no autocast, narrower parameters widened, no TF32. Gives the batch to use."""

    def is_narrow(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize

    narrow = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if is_narrow(t)]
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if narrow:
            batch = pytree.tree_map(
                lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and is_narrow(leaf) else leaf, batch
            )
        for tensor, data in narrow:
            tensor.data = data.to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield batch
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for tensor, data in narrow:
            wide, tensor.data = tensor.data, data
            if not torch.equal(wide, data.to(wide.dtype)):  # the forward wrote to it
                data.copy_(wide)


@contextlib.contextmanager
def batch_statistics_aside(model: nn.Module) -> Iterator[None]:
    """BatchNorm by its running statistics and spectral norm without its iteration: both are known to depend on the
    micro-batch, are told of in the plan or by `aside_texts`, and must not hide or look like a wrong loss."""
    aside = [module for module in model.modules() if module.training and _is_known(module)]
    bare = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    for norm in bare:  # statistics of nothing
        weight = next(model.parameters())
        norm.running_mean = torch.zeros(norm.num_features, dtype=weight.dtype, device=weight.device)
        norm.running_var = torch.ones_like(norm.running_mean)
    for module in aside:
        module.training = False
    try:
        yield
    finally:
        for module in aside:
            module.training = True
        for norm in bare:
            norm.running_mean = norm.running_var = None


def aside_texts(model: nn.Module) -> list[str]:
    """What to tell of modules that are set aside here and that the plan says nothing of."""
    texts = []
    training = [(name, module) for name, module in model.named_modules() if module.training]
    named = [(name, type(m).__name__) for name, m in training if _is_batch_norm_by_name(m)]
    if named:
        texts.append(
            f"{named[0][1]} ('{named[0][0]}') was left out of the check of the loss, as BatchNorm by its name. If "
            "it normalises over the samples of a micro-batch, the result depends on the split, and no norm=... "
            "reaches it: use nn.BatchNorm1d to 3d, which norm=exact makes exact, or nn.GroupNorm. gatrain verify "
            "measures it."
        )
    spectral = [name for name, module in training if _iterates(module)]
    if spectral:
        texts.append(
            f"spectral_norm ('{spectral[0]}') moves its estimate in each forward, so the result depends on the "
            "number of micro-steps. With batch.micro as large as memory allows it does least; gatrain verify "
            "measures it."
        )
    return texts


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or _is_batch_norm_by_name(module) or _iterates(module)


def _is_batch_norm_by_name(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    holds_one = any(isinstance(each, _BatchNorm) for each in module.modules())
    return "batchnorm" in name and "frozen" not in name and not holds_one


def _iterates(module: nn.Module) -> bool:
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks
