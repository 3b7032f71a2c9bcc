"""The precisions that a gradient is computed in: two for proof, and the one that trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gatrain.train.main_gradients import HALF
from gatrain.verify.limits import coarsest

NAMES = {torch.float64: "fp64", torch.float32: "fp32", **HALF}


@dataclass(frozen=True)
class Path:
    """One way to compute: parameters, buffers and inputs in ``dtype``, the forward under ``autocast``."""

    name: str
    """The coarsest precision that takes part."""
    dtype: torch.dtype | None
    """None leaves everything as it trains."""
    autocast: str = "fp32"

    @property
    def trains(self) -> bool:
        return self.dtype is None


FP64, FP32 = Path("fp64", torch.float64), Path("fp32", torch.float32)


def trained_path(model: nn.Module, precision: str) -> Path | None:
    """The path of training, where that is neither fp32 nor fp64 throughout."""
    dtypes = {NAMES[t.dtype] for t in (*model.parameters(), *model.buffers()) if t.dtype in NAMES}
    name = coarsest(precision, *dtypes)
    return Path(name, None, precision) if name in HALF.values() else None


class NoticeCasts(TorchDispatchMode):
    """Notices where code leaves fp64: ``seen`` has the names of the coarser dtypes that fp64 numbers became."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(tensor.dtype == torch.float64 for tensor in _numbers((args, kwargs))):
            self.seen |= {NAMES[tensor.dtype] for tensor in _numbers(out) if tensor.dtype in NAMES} - {"fp64"}
        return out


def _numbers(nested: Any) -> Iterable[Tensor]:
    """More than one number each: constants lose nothing that depends on the batch."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor) and leaf.numel() > 1]
