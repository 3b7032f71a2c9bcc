"""What some modules do that training has to know of: sparse gradients, talk between ranks, mixing of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatrain.errors import ConfigError


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the modules that mix the samples of a micro-batch: their results depend on its size.

    One in evaluation mode uses its running statistics and mixes nothing.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]


def synchronised_norms(model: nn.Module, device: torch.device) -> list[str]:
    """Names of the SyncBatchNorm modules, in each of whose forwards all ranks take part.

    Raises:
        ConfigError: on a CPU, where PyTorch has no such thing.
    """
    names = [name for name in batch_norms(model) if isinstance(model.get_submodule(name), nn.SyncBatchNorm)]
    if names and device.type == "cpu":
        raise ConfigError(
            f"SyncBatchNorm ({names[0]}) works on GPUs only. On a CPU use nn.GroupNorm, which is exact for any "
            "split, nn.BatchNorm, or one process."
        )
    return names


def unequal_steps_text(names: Sequence[str], steps: Sequence[float]) -> str:
    """Why a window cannot be computed in which the ranks have these numbers of micro-steps."""
    numbers = ", ".join(f"{count:g}" for count in steps)
    return (
        f"SyncBatchNorm ({names[0]}) needs equally many micro-steps on every rank, or the ranks wait for each "
        f"other for ever; this window would give them {numbers}. Use a batch.effective that divides by the number "
        "of ranks, train.drop_last=true for a short window at the end of an epoch, or nn.GroupNorm."
    )


def sparse_modules(model: nn.Module) -> list[str]:
    """Names of the modules that give their weight a sparse gradient."""
    return [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]


def sparse_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of `sparse_modules`."""
    return {
        id(p) for name in sparse_modules(model) for p in model.get_submodule(name).parameters(recurse=False)
    }
