"""Clipping of a window's gradient: once, reduced, by its norm or unit by unit (AGC), by groups where asked."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from gatrain.errors import ConfigError, nearest
from gatrain.optimizer_config import CLIP_KEYS, OptimizerConfig
from gatrain.train.output_layers import output_layers

if TYPE_CHECKING:
    from gatrain.train.parallel import Replicated

UNIT_EPS = 1e-3
"""Norm that a unit's weights count at least, so that those which begin at zero can move: that of the paper."""


@dataclass
class Part:
    """Parameters that are clipped together."""

    norm: float | None
    """Largest L2 norm of the gradient of all of them; None does not clip it."""
    agc: float | None
    """Largest ratio of the norms of a unit's gradient and its weights; None leaves units alone."""
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    """The model's own."""


def parts_of(
    config: OptimizerConfig,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    rule_of: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Part], list[str]]:
    """How each trained parameter is clipped, and the names of those that AGC leaves out as the output layer.

    Args:
        trained: those that the optimizer steps, by name.
        rule_of: the rule of ``optimizer.groups`` for each parameter that has one, by its name. One that names a
            clip key clips its own parameters, together, in that way alone.

    Raises:
        ConfigError: a pattern of ``optimizer.clip_agc_exclude`` that matches nothing.
    """
    spared = _spared(config, model) if config.clip_agc is not None else set()
    found: dict[Any, Part] = {}
    for name, parameter in trained.items():
        rule = rule_of.get(name, {})
        if CLIP_KEYS & rule.keys():
            key: Any = repr(sorted(rule.items(), key=str))
            part = Part(rule.get("clip_norm"), rule.get("clip_agc"))
        else:
            key = name in spared
            part = Part(config.clip_norm, None if name in spared else config.clip_agc)
        part = found.setdefault(key, part)
        part.names.append(name)
        part.parameters.append(parameter)
    left_out = found[True].names if True in found and config.clip_agc_exclude is None else []
    return list(found.values()), left_out


def _spared(config: OptimizerConfig, model: nn.Module) -> set[str]:
    """Names of the parameters that AGC leaves out: the output layer, or what the user lists."""
    patterns = config.clip_agc_exclude
    if patterns is None:
        ids = {id(p) for module in output_layers(model) for p in module.parameters()}
        return {name for name, p in model.named_parameters() if id(p) in ids}
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = nearest(pattern.strip("*."), names)
            raise ConfigError(f"optimizer.clip_agc_exclude: {pattern!r} matches no parameter.{hint}")
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


class Clipping:
    """Clips the gradient that is the same on every rank, and gives its norm before.

    Args:
        parts: `parts_of` the model.
        model: for the layout of its weights.
        of: what is stepped for a parameter of the model (`gatrain.train.main_gradients.MasterWeights.of`).
        sparse: ids of parameters with sparse gradients.

    Raises:
        ConfigError: AGC of parameters with sparse gradients.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        model: nn.Module,
        of: Callable[[nn.Parameter], nn.Parameter],
        sparse: Collection[int] = (),
    ) -> None:
        self._parts = [(part, [of(parameter) for parameter in part.parameters]) for part in parts]
        transposed = {id(m.weight) for m in model.modules() if isinstance(m, _ConvTransposeNd)}
        self._second = {id(of(p)) for part in parts for p in part.parameters if id(p) in transposed}
        """Parameters laid out [inputs, outputs, ...]."""
        for part in parts:
            if part.agc is not None and any(id(parameter) in sparse for parameter in part.parameters):
                raise ConfigError(
                    f"clip_agc={part.agc:g} compares the norms of a unit's gradient and weights, which a sparse "
                    "gradient (sparse=True) has not got. Write sparse=False in the model, or clip_norm."
                )

    def __call__(self, parallel: Replicated) -> Tensor:
        """Clip; a scalar on the device. Nothing waits for it."""
        if len(self._parts) == 1 and self._parts[0][0].agc is None:
            return parallel.clip(self._parts[0][0].norm)
        norms = []
        for part, parameters in self._parts:
            norms.append(parallel.clip(part.norm, parameters))
            if part.agc is not None:
                for parameter in parameters:
                    if parameter.grad is not None:
                        clip_units(parameter, part.agc, unit=int(id(parameter) in self._second))
        device = self._parts[0][1][0].device  # of a part without any gradient the norm is a zero on the host
        squares = torch.stack([norm.to(device, torch.float64).square() for norm in norms])
        return squares.sum().sqrt()


@torch.no_grad()
def clip_units(parameter: Tensor, factor: float, *, unit: int = 0) -> None:
    """Adaptive gradient clipping: Brock et al., "High-Performance Large-Scale Image Recognition Without
    Normalization", 2021, equation 3 (arXiv:2102.06171), of one parameter's ``.grad``, in place.

    A unit's gradient with a norm above ``factor`` times that of its weights (of `UNIT_EPS`, if they are smaller) is
    scaled down to that. A vector is one unit.

    Args:
        unit: dimension of the units in a parameter of several dimensions: 0 of [outputs, inputs, ...].
    """
    gradient = parameter.grad
    assert gradient is not None
    dims = [dim for dim in range(parameter.dim()) if dim != unit] if parameter.dim() > 1 else None
    most = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).clamp_(min=UNIT_EPS).mul_(factor)
    norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
    gradient.mul_(torch.where(norm > most, most / norm, 1.0))
