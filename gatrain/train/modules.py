"""What some modules do that training has to know of: sparse gradients, talk between ranks, mixing of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        if (isinstance(module, _BatchNorm) and (module.training or module.running_mean is None))
        or (is_scripted_norm(module) and module.training)
    ]


def is_scripted_norm(module: nn.Module) -> bool:
    """Whether `torch.jit.script` compiled a BatchNorm, which can be neither followed nor changed any more."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted and "BatchNorm" in str(getattr(module, "original_name", ""))


def scripted_text(key: str, name: str) -> str:
    """Why ``key`` is refused for a scripted BatchNorm."""
    return (
        f"{key}: BatchNorm ('{name}') is compiled by torch.jit.script, which can neither be followed nor changed: "
        "give the model without it."
    )


def synchronised_norms(model: nn.Module, device: torch.device) -> list[str]:
    """Names of the SyncBatchNorm modules, in each of whose forwards all ranks take part.

    Raises:
        ConfigError: on a CPU, where PyTorch has no such thing.
    """
    names = [name for name in batch_norms(model) if isinstance(model.get_submodule(name), nn.SyncBatchNorm)]
    if names and device.type == "cpu":
        raise ConfigError(
            f"SyncBatchNorm ('{names[0]}') works on GPUs only. On a CPU use norm=group (GroupNorm), which is "
            "exact for any split, nn.BatchNorm, or one process."
        )
    return names


def unequal_steps_text(names: Sequence[str], steps: Sequence[float]) -> str:
    """Why a window cannot be computed in which the ranks have these numbers of micro-steps."""
    numbers = ", ".join(f"{count:g}" for count in steps)
    return (
        f"SyncBatchNorm ('{names[0]}') needs equally many micro-steps on every rank, or the ranks wait for each "
        f"other for ever; this window would give them {numbers}. Use a batch.effective that divides by the number "
        "of ranks, train.drop_last=true for a short window at the end of an epoch, or norm=group."
    )


def check_is_replicated(model: nn.Module) -> None:
    """Refuse a model of which every rank holds a part only: its forwards are collectives, so ranks with unequal
    numbers of micro-steps would wait for each other for ever, and its gradients are reduced by whoever sharded it.

    Raises:
        ConfigError: FullyShardedDataParallel, ``fully_shard`` or another use of DTensor.
    """
    wrapped = next((m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
    name = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if wrapped is None and name is None:
        return
    what = "is in FullyShardedDataParallel" if name is None else f"is sharded ('{name}' is a DTensor)"
    raise ConfigError(
        f"the model {what}. gatrain adds the gradients of ranks that all hold the whole model: give it the model "
        "itself, or in DistributedDataParallel."
    )


def sparse_modules(model: nn.Module) -> list[str]:
    """Names of the modules that give their weight a sparse gradient."""
    return [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]


def sparse_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of `sparse_modules`."""
    return {
        id(p) for name in sparse_modules(model) for p in model.get_submodule(name).parameters(recurse=False)
    }


def mode_remarks(model: nn.Module) -> list[str]:
    """What there is to say of modules that come in evaluation mode: one sentence, or none where it changes nothing.

    gatrain trains a model in the mode in which it comes. Frozen parts, without a trained parameter, may well be in
    evaluation mode on purpose.
    """
    asleep = [
        (name, kind)
        for name, module in _trained_parts(model)
        if not module.training and (kind := _acts_by_mode(module)) is not None
    ]
    if not asleep:
        return []
    kinds = dict.fromkeys(kind for _, kind in asleep)
    parts = []
    for kind in kinds:
        names = [name or type(model).__name__ for name, each in asleep if each == kind]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.append(f"{kind} ('{names[0]}'{more})")
    whole = "The model comes" if not model.training else "Parts of the model come"
    return [
        f"{whole} in evaluation mode and will train in it: {', '.join(parts)}. If that is not intended, "
        "let its factory call model.train()."
    ]


def _trained_parts(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside frozen parts."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return
    yield name, model
    for key, child in model.named_children():
        yield from _trained_parts(child, f"{name}.{key}" if name else key)


def _acts_by_mode(module: nn.Module) -> str | None:
    """What is otherwise in evaluation mode, in words; None if nothing is, as far as can be seen."""
    if isinstance(module, _BatchNorm):
        return "BatchNorm uses its running statistics"
    rates = [
        float(value)
        for key, value in vars(module).items()
        if ("drop" in key.lower() or (key == "p" and "drop" in type(module).__name__.lower()))
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]
    if rates:
        return "no dropout" if any(rates) else None
    if type(module).__module__.startswith(("torch.", "transformers.")):
        return None
    code = getattr(type(module).forward, "__code__", None)
    asks = code is not None and "training" in code.co_names
    return "what asks for self.training is off" if asks else None
