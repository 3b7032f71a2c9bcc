"""The optimizer of a run: a shipped one or the user's own, over the groups of `gatrain.train.groups`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, SavedStateError
from gatrain.optimizer_config import (
    AdafactorConfig,
    AdamAConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from gatrain.optimizers import AdamA, Lion, Muon
from gatrain.train.groups import Group, Grouping, check_options
from gatrain.train.main_gradients import HALF
from gatrain.train.modules import sparse_modules
from gatrain.train.optimizer_attributes import LateAttributes
from gatrain.train.optimizer_state import Behaviour, changed_options, options_of, state_bytes, try_out

PART = "optimizer_groups"
"""Of a saved state (`gatrain.states.RESERVED`)."""


def check_takes_sparse(config: OptimizerConfig, model: nn.Module) -> None:
    """Refuse an optimizer that would fail in its first step on the sparse gradients of a model.

    Raises:
        ConfigError: names the module and what to write.
    """
    names = sparse_modules(model)
    if not names or config.node is not None:  # one of the user's own shows what it can (`try_out`)
        return
    fails = [
        key
        for key, is_so in (
            (f"optimizer={config.name}", not isinstance(config, SGDConfig)),
            (f"optimizer.weight_decay={config.weight_decay:g}", bool(config.weight_decay)),
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


Maker = Callable[[OptimizerConfig, list[dict[str, Any]], bool | None], torch.optim.Optimizer]
"""From the configuration, groups of parameters and whether fused kernels may serve (None: no) to the optimizer."""


@dataclass
class Built:
    """An optimizer with what gatrain has to know of it."""

    optimizer: torch.optim.Optimizer
    lr: float
    """Peak rate of parameters without a rule of their own."""
    scales: list[float]
    """For each of its groups, what its rate is times that of the others."""
    grouping: Grouping
    """With the model's own parameters."""
    begun: list[dict[str, Any]]
    """The options of its groups before the first step."""
    behaviour: Behaviour
    late: Callable[[], str] = lambda: ""
    """What it has begun to keep where no state holds it, in words; '' for nothing."""

    def parts(self) -> dict[str, Any]:
        """Part of a saved state beside the state of each parameter: options that the optimizer has changed."""
        changed = changed_options(self.optimizer, self.begun)
        if not (self.behaviour.counts_in_groups or any(changed)):  # it may begin to change them late in a run
            return {}
        return {PART: {"groups": changed}}

    def load(self, parts: dict[str, Any]) -> None:
        """Take this part out of those of a saved state.

        Raises:
            SavedStateError: it is missing, or of other groups.
        """
        part = parts.pop(PART, None)
        if part is None and not self.behaviour.counts_in_groups:
            return
        groups = part.get("groups") if isinstance(part, dict) else None
        if not isinstance(groups, list) or [type(each) for each in groups] != [dict] * len(self.begun):
            raise SavedStateError(
                f"{type(self.optimizer).__name__} counts in its groups' options, and the saved state has none "
                "that fit this run's groups."
            )
        for group, options in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(options)

    def set_rate(self, lr: float) -> None:
        """Give every group its rate where the rate of the others is ``lr``."""
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr if scale == 1.0 else lr * scale


def build_optimizer(
    config: OptimizerConfig,
    grouping: Grouping,
    of: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    *,
    sparse: Collection[int] = (),
    maker: Maker | None = None,
    try_first: bool = True,
) -> Built:
    """The optimizer over the groups that the configuration makes of a model's parameters.

    Args:
        config: which one, with its values.
        grouping: `gatrain.train.groups.group_parameters` of the model.
        of: what is stepped for a parameter of the model (`gatrain.train.main_gradients.MasterWeights.of`).
        sparse: ids of parameters with sparse gradients, which fused kernels cannot take.
        maker: makes one of the user's own; the shipped ones by default.
        try_first: step small parameters with one of its kind (`gatrain.train.optimizer_state.try_out`).

    Raises:
        ConfigError: it does not take the groups, has no rate, or its step needs more than gradients.
    """
    groups = [_as_dict(group, of) for group in grouping.groups]
    parameters = [p for group in groups for p in group["params"]]
    fused = (all(p.is_cuda for p in parameters) and not sparse) or None

    def make(given: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return (maker or make_shipped)(config, given, fused)

    has_sparse = [p for group in grouping.groups for p in group.parameters if id(p) in sparse]
    has_options = any(group.options for group in grouping.groups)  # any of the class, such as dampening
    if (type(config) in (AdamWConfig, SGDConfig) and not has_options) or not try_first:
        behaviour = Behaviour(can_be_primed=True)
    else:
        behaviour = try_out(make, groups, [of(p) for p in has_sparse], large=maker is not None)
    optimizer = make(groups)
    what = type(optimizer).__name__
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if {id(p) for p in held} != {id(p) for p in parameters} or len(held) != len(parameters):
        raise ConfigError(f"{what} does not hold the parameters that it was given, each once.")
    check_options(grouping.groups, {**optimizer.defaults, **optimizer.param_groups[0]}, what)
    rates = [group.get("lr") for group in optimizer.param_groups]
    if not all(isinstance(rate, int | float) for rate in rates):
        raise ConfigError(
            f"{what} has a group without a number as its rate (lr={rates[0]!r}), so no schedule can set it. Give "
            "it optimizer.lr=..., and switch off what chooses a rate by itself."
        )
    lr = config.lr if config.lr is not None else optimizer.defaults.get("lr")
    if not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        raise ConfigError(f"{what} has no usual rate (lr={lr!r}). Give it optimizer.lr=....")
    scales = _scales(optimizer, grouping.groups, of, float(lr))
    built = Built(optimizer, float(lr), scales, grouping, options_of(optimizer), behaviour)
    if maker is not None:
        built.late = LateAttributes(optimizer, behaviour.moves).unsaved
    return built


def counted_state(
    config: OptimizerConfig, grouping: Grouping, sparse: Collection[int] = (), maker: Maker | None = None
) -> list[int]:
    """Bytes of each tensor that the optimizer keeps for a model's parameters, whose memory is not needed.

    Raises:
        ConfigError: as `build_optimizer`.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    for parameter in (p for group in grouping.groups for p in group.parameters):
        dtype = torch.float32 if parameter.dtype in HALF else parameter.dtype  # the master weight
        stand_ins[id(parameter)] = nn.Parameter(
            torch.empty(tuple(parameter.shape), dtype=dtype, device="meta")
        )

    def of(parameter: nn.Parameter) -> nn.Parameter:
        return stand_ins[id(parameter)]

    def make(given: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return (maker or make_shipped)(config, given, None)

    build_optimizer(config, grouping, of, sparse=sparse, maker=maker)
    try:
        return state_bytes(make, [_as_dict(group, of) for group in grouping.groups])
    except Exception:  # on a GPU alone, say: trials measure it
        return []


def _as_dict(group: Group, of: Callable[[nn.Parameter], nn.Parameter]) -> dict[str, Any]:
    made: dict[str, Any] = {"params": [of(parameter) for parameter in group.parameters], **group.options}
    if group.weight_decay is not None:
        made["weight_decay"] = group.weight_decay
    return made


def _scales(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    of: Callable[[nn.Parameter], nn.Parameter],
    lr: float,
) -> list[float]:
    """By the parameters in it: an optimizer may order and split its groups as it likes."""
    scale_of = {
        id(of(p)): group.lr_scale if group.lr is None else group.lr / (lr or 1.0)
        for group in groups
        for p in group.parameters
    }
    found = []
    for group in optimizer.param_groups:
        scales = {scale_of[id(p)] for p in group["params"]} or {1.0}
        if len(scales) > 1:
            raise ConfigError(
                f"{type(optimizer).__name__} puts parameters with different rates into one group."
            )
        found.append(scales.pop())
    return found


def make_shipped(
    config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool | None
) -> torch.optim.Optimizer:
    """One that has a short name."""
    assert config.lr is not None
    if isinstance(config, AdamAConfig):  # an AdamWConfig too
        return AdamA(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    if isinstance(config, AdamWConfig):
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=fused)
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
        )
    if isinstance(config, MuonConfig):
        return Muon(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr_fn,
            betas=config.betas,
            eps=config.eps,
            fused=fused,
        )
    if isinstance(config, AdafactorConfig):
        return torch.optim.Adafactor(groups, lr=config.lr, beta2_decay=config.beta2_decay, d=config.d)
    if isinstance(config, LionConfig):
        return Lion(groups, lr=config.lr, betas=config.betas)
    raise TypeError(f"no optimizer for {type(config).__name__}")


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
