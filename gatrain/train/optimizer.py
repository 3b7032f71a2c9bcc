"""Optimizers and learning-rate schedules, counted in optimizer steps or samples, never in micro-steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.config import AdamWConfig, OptimizerConfig, ScheduleConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.train.modules import sparse_modules


def check_takes_sparse(config: OptimizerConfig, model: nn.Module) -> None:
    """Refuse an optimizer that would fail in its first step on the sparse gradients of a model.

    Raises:
        ConfigError: names the module and what to write.
    """
    names = sparse_modules(model)
    if not names:
        return
    fails = [
        key
        for key, is_so in (
            (f"optimizer={config.name}", not isinstance(config, SGDConfig)),
            (f"optimizer.weight_decay={config.weight_decay:g}", config.weight_decay > 0),
            ("optimizer.nesterov=true", isinstance(config, SGDConfig) and config.nesterov),
        )
        if is_so
    ]
    if fails:
        raise ConfigError(
            f"'{names[0]}' gives sparse gradients (sparse=True), which {' and '.join(fails)} cannot take. "
            "Write sparse=False in the model, or use optimizer=sgd optimizer.weight_decay=0 "
            "optimizer.nesterov=false."
        )


def build_optimizer(
    config: OptimizerConfig,
    parameters: Sequence[nn.Parameter],
    exempt: Iterable[nn.Parameter] = (),
    *,
    sparse: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (fused on a GPU) or SGD; weight decay on parameters of two or more dimensions only.

    Args:
        config: which one, with its values.
        parameters: those that are trained (`gatrain.train.main_gradients.MasterWeights` for 16-bit ones).
        exempt: those of them that get no weight decay, whatever their shape (`exempt_from_decay`).
        sparse: some of them have sparse gradients, which fused kernels cannot take.
    """
    spared = {id(p) for p in exempt}
    decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in spared]
    others = [p for p in parameters if p.dim() < 2 or id(p) in spared]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = (all(p.is_cuda for p in parameters) and not sparse) or None
    if isinstance(config, AdamWConfig):
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=fused)
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
        )
    raise TypeError(f"no optimizer for {type(config).__name__}")


def exempt_from_decay(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of two or more dimensions that the model wants without weight decay, by name.

    It says so in the ways that are usual: ``no_weight_decay()`` of any of its modules gives names (timm),
    ``no_weight_decay_keywords()`` parts of names (Swin), and a parameter may carry ``_no_weight_decay`` (Mamba).

    Raises:
        ConfigError: such a method cannot be called.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        names, parts = _listed(module, "no_weight_decay"), _listed(module, "no_weight_decay_keywords")
        if not names and not parts:
            continue
        for name, parameter in module.named_parameters():
            if any(name == each or name.endswith(f".{each}") for each in names) or any(
                p in name for p in parts
            ):
                found[f"{prefix}.{name}".strip(".")] = parameter
    found.update({n: p for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)})
    return {name: p for name, p in found.items() if p.requires_grad and p.dim() >= 2}


def _listed(module: nn.Module, method: str) -> list[str]:
    call = getattr(module, method, None)
    if not callable(call):
        return []
    try:
        return [str(name) for name in call()]
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__}.{method}() should list the names of parameters without weight decay, but "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def dense_parts(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, of each sparse one the values of its rows: norms of sparse tensors do not exist on GPUs."""
    return [each.coalesce().values() if each.is_sparse else each for each in gradients]


@torch.no_grad()
def clip_with_sparse(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where gradients may be sparse; ``limit`` None only takes the norm."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    if limit is not None:
        for parameter in given:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # so that its values below are its own
    values = dense_parts([parameter.grad for parameter in given if parameter.grad is not None])
    norm = nn.utils.get_total_norm(values)
    if limit is not None:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        for value in values:
            value.mul_(factor)
    return norm


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state before the first step, with the values that it would start from.

    Made during the first update, it is cut out of the blocks that activations have left, which then no longer serve
    the next step's: GPT-2 124M at 32 samples reserved 16 % more memory on an H100 (``tests/benchmarks/results``).
    Nothing moves: the rate is zero, and all state is set to zero afterwards, also the count of steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(
    config: ScheduleConfig, peak: float, *, step: int, total_steps: int, effective_batch: int
) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or cosine decay.

    With ``warmup_samples`` the warm-up covers the same samples whatever the effective batch.
    """
    warmup = float(config.warmup_steps)
    if config.warmup_samples is not None:
        warmup = config.warmup_samples / effective_batch
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    if config.name == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.final_fraction + (1 - config.final_fraction) * cosine)
