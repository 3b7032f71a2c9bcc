"""The BatchNorm computations of a forward, in their order, whichever modules and functions make them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gatrain.errors import ConfigError, ExactnessError
from gatrain.train.modules import is_scripted_norm, scripted_text


@dataclass(frozen=True)
class Site:
    """One place of a forward where BatchNorm normalises by the batch."""

    name: str | None
    """Of the module that has its running statistics; None where there are none."""
    channels: int


@dataclass(frozen=True)
class Call:
    """What one BatchNorm computation is given."""

    input: Tensor
    """Shape [samples, channels, ...]."""
    running_mean: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float

    def site(self, names: dict[int, str]) -> Site:
        """
        Args:
            names: id of running mean -> module, as `owners_of` gives them.

        Raises:
            ConfigError: running statistics that no module has.
        """
        name = None if self.running_mean is None else names.get(id(self.running_mean))
        if name is None and self.running_mean is not None:
            raise ConfigError(
                "norm=exact: the model computes BatchNorm with running statistics that are no buffers of a module "
                "named running_mean and running_var, so they cannot be moved. Use nn.BatchNorm, or norm=keep."
            )
        return Site(name, self.input.shape[1])


def owners_of(model: nn.Module) -> dict[int, str]:
    """Id of each running mean, with the name of its module.

    Raises:
        ConfigError: BatchNorm in scripted code, which calls none of the functions that are followed.
    """
    scripted = {name: m for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    for name, module in scripted.items():
        if module.training and is_scripted_norm(module):
            raise ConfigError(scripted_text("norm=exact", name))
    return {
        id(module._buffers["running_mean"]): name
        for name, module in model.named_modules()
        if name not in scripted
        and module._buffers.get("running_mean") is not None
        and module._buffers.get("running_var") is not None
    }


class BatchNormCalls(TorchFunctionMode):
    """In this context ``instead`` computes every BatchNorm that normalises by its batch. No module is changed.

    Args:
        instead: gives its result.
        before_backward: hears of what a backward is about to start from.

    Raises:
        ConfigError: a computation in the forward that would be another one so: gradients of gradients, or a kernel
            below the functions that are known.
    """

    def __init__(
        self, instead: Callable[[Call], Tensor], before_backward: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self._instead, self._before_backward = instead, before_backward

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            given = _given(func, args, kwargs)
            if given["training"]:
                return self._instead(Call(**{key: given[key] for key in Call.__dataclass_fields__}))
        elif func is _BACKWARD:
            if self._before_backward is not None:
                self._before_backward(args[0])
            with _no_batch_norm():  # no mode is active in a backward, on whichever thread it runs
                return func(*args, **kwargs)
        elif func in _REFUSED:
            raise ConfigError(
                f"norm=exact: the model or its loss calls {_REFUSED[func]}, which norm=exact cannot follow. "
                "Use norm=keep or norm=group."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def _no_batch_norm() -> Iterator[None]:
    """In here a BatchNorm over its batch is refused: what a backward computes anew would be over a micro-batch.

    Threads that take turns may be in here together.
    """
    _refusing.depth += 1
    F.batch_norm = _refuse
    try:
        yield
    finally:
        _refusing.depth -= 1
        if not _refusing.depth:
            F.batch_norm = _batch_norm


class _Refusing:
    depth = 0
    """Backwards under way."""


_refusing = _Refusing()
_batch_norm: Any = F.batch_norm


def _refuse(*args: Any, **kwargs: Any) -> Any:
    if _given(_batch_norm, args, kwargs)["training"]:
        raise ExactnessError(
            "norm=exact: the model computes BatchNorm anew in the backward (activation checkpointing of its "
            "own). Switch that off, or use norm=keep or norm=group."
        )
    return _batch_norm(*args, **kwargs)


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name. (`inspect.Signature.bind` takes as long as a small layer.)"""
    names, defaults = _SIGNATURES[func]
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _named(like: Callable[..., None]) -> tuple[list[str], dict[str, Any]]:
    parameters = inspect.signature(like).parameters
    return list(parameters), {
        name: each.default for name, each in parameters.items() if each.default is not each.empty
    }


def _functional(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> None: ...  # fmt: skip


def _below(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> None: ...  # fmt: skip


_BACKWARD: Any = Tensor.backward
_SIGNATURES = {_batch_norm: _named(_functional), torch.batch_norm: _named(_below)}
_REFUSED: dict[Any, str] = {
    torch.autograd.grad: "torch.autograd.grad in the forward (a gradient penalty, an adversarial step)",
    torch.native_batch_norm: "torch.native_batch_norm",
    torch.batch_norm_stats: "torch.batch_norm_stats",
}
