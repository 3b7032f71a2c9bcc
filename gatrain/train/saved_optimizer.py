"""An optimizer's state in a saved state: by parameter name, and compared with what the optimizer can hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatrain import schema
from gatrain.errors import SavedStateError
from gatrain.states import Contents, Progress
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.optimizer_state import is_plain
from gatrain.train.phased_optimizer import PhasedOptimizer
from gatrain.train.seeding import kept_random_state

_MASTER = "master"
"""Key of a 16-bit parameter's fp32 master weight, beside the optimizer's own."""
_DIFFERENCES = 5
"""Of a model or an optimizer that a message lists."""


def take_masters(
    path: Path,
    model: nn.Module,
    masters: MasterWeights | None,
    state: dict[str, Tensor],
    progress: Progress,
) -> dict[Tensor, Tensor]:
    """Take the fp32 weights of 16-bit parameters out of the optimizer's state."""
    if masters is None:
        return {}
    found: dict[Tensor, Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, master in masters.weights():
        value = state.pop(f"{names[parameter]}/{_MASTER}", None)
        if value is None:
            if progress.updates:
                raise SavedStateError(f"{path} has no fp32 weights of the 16-bit {names[parameter]}.")
        elif value.shape != master.shape or value.dtype != master.dtype or not torch.isfinite(value).all():
            raise SavedStateError(f"{path} has other fp32 weights than {names[parameter]} can have.")
        else:
            found[parameter] = value
    return found


def optimizer_values(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masters: MasterWeights | None,
    tensors: Mapping[str, Tensor],
    contents: Contents,
) -> list[tuple[Tensor, str, Any]]:
    if contents.optimizer != _name_of(optimizer):
        raise SavedStateError(
            f"{path} was saved with the optimizer {schema.shown(contents.optimizer)[1:-1]}, "
            f"but this run uses {_name_of(optimizer)}."
        )
    parameters = {name: parameter for parameter, name in _names(model, masters).items()}
    if twice := tensors.keys() & contents.values.keys():
        raise SavedStateError(f"{path} has two values of {min(twice)} in the optimizer's state.")
    found: dict[str, dict[str, Any]] = {}
    for place, value in {**tensors, **contents.values}.items():
        name, _, key = place.rpartition("/")
        if name not in parameters:
            raise SavedStateError(f"{path} has optimizer state for {name!r}, which the model does not have.")
        found.setdefault(name, {})[key] = value
    wanted = _usual_state(optimizer)
    if contents.progress.updates and not found and any(wanted.values()):
        raise SavedStateError(f"{path} has no optimizer state after {contents.progress.updates} updates.")
    differences = []
    most_steps = contents.progress.step * getattr(optimizer, "most_updates", 1)
    for name, values in found.items():
        parameter = parameters[name]
        usual = wanted.get(id(parameter)) or {}
        differences += [f"{name} has no {key}" for key in usual if key not in values]
        differences += [
            f"{key} of {name} {problem}"
            for key, value in values.items()
            if (problem := _oddity(key, value, usual.get(key), parameter, most_steps))
        ]
    if differences:
        raise SavedStateError(f"{path} has a state that the optimizer cannot have: {listed(differences)}.")
    return [(parameters[name], key, value) for name, values in found.items() for key, value in values.items()]


def _name_of(optimizer: torch.optim.Optimizer) -> str:
    if isinstance(optimizer, PhasedOptimizer):
        return optimizer.saved_name
    return type(optimizer).__name__


_PROBE = (3, 5, 2, 4, 7)
"""Sides of the tensor that an optimizer is tried with."""


def _usual_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What one step leaves behind for each parameter, by its id; for optimizers of PyTorch's own."""
    if isinstance(optimizer, PhasedOptimizer):
        return {
            name: state
            for part in optimizer.parts.values()
            for name, state in _usual_state(part.optimizer).items()
        }
    if not type(optimizer).__module__.startswith("torch.optim"):
        return {}
    found: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        tried: dict[int, dict[str, Any]] = {}  # by number of dimensions, on which it may depend
        for parameter in group["params"]:
            if parameter.dim() not in tried:
                tried[parameter.dim()] = _tried(optimizer, group, parameter.dim())
            found[id(parameter)] = tried[parameter.dim()]
    return found


def _tried(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dim: int) -> dict[str, Any]:
    takes = inspect.signature(type(optimizer)).parameters
    options = {key: group[key] for key in optimizer.defaults if key in group and key in takes}
    probe = nn.Parameter(torch.zeros(_PROBE[:dim]))
    probe.grad = torch.ones(_PROBE[:dim])
    try:
        with kept_random_state():
            other = type(optimizer)([probe], **options)
            other.step()
    except Exception:  # an option for a GPU alone: nothing is known
        return {}
    return dict(other.state[probe])


def _oddity(key: str, value: Any, usual: Any, parameter: Tensor, steps: int) -> str | None:
    """What is wrong with one value of an optimizer's state; ``usual`` is what `_tried` found there."""
    if isinstance(value, Tensor):
        if usual is None:
            return None
        # infinite it may be: squares of large gradients overflow, and the parameter stays as it is
        if value.is_floating_point() and torch.isnan(value).any():
            return "is not a number"
        if not isinstance(usual, Tensor):
            return "is a tensor"
        if usual.shape == _PROBE[: parameter.dim()] and value.shape != parameter.shape:
            return f"has the shape {list(value.shape)}"
        if usual.dim() == 0 and value.dim():
            return f"has the shape {list(value.shape)}"
        if value.is_floating_point() != usual.is_floating_point():
            return f"is {value.dtype}"
        if key == "step" and not 0 <= float(value) <= steps:
            return f"is {float(value):g} after {steps} steps"
        return None
    if isinstance(usual, Tensor) or not isinstance(value, bool | int | float | str | list | dict | None):
        return f"is {schema.shown(value)}"
    if isinstance(usual, int | float) and type(value) not in (int, float, bool):
        return f"is {schema.shown(value)}"
    return None


def listed(differences: list[str]) -> str:
    return "; ".join(sorted(differences)[:_DIFFERENCES]) + (
        "; ..." if len(differences) > _DIFFERENCES else ""
    )


def _names(model: nn.Module, masters: MasterWeights | None) -> dict[Tensor, str]:
    """The name of each parameter that the optimizer may step."""
    return {
        masters.of(parameter) if masters is not None else parameter: name
        for name, parameter in model.named_parameters()
    }


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state by parameter name: tensors as ``<parameter>/<key>``, everything else as JSON.

    Raises:
        SavedStateError: it has come to hold what no file can.
    """
    names = _names(model, masters)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"class": _name_of(optimizer), "values": {}}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            is_known = parameter in names and isinstance(key, str) and "/" not in key
            if not is_known or not (isinstance(value, Tensor) or is_plain(value)):
                raise SavedStateError(
                    f"{_name_of(optimizer)} has come to keep a {type(value).__name__} at {key!r} of its state, "
                    "which cannot be saved: tensors, numbers and text, each in self.state[parameter], by a text "
                    "without '/'."
                )
            place = f"{names[parameter]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = value.detach().cpu().contiguous()
            else:
                scalars["values"][place] = value
    for _, master in masters.weights() if masters is not None else ():
        if (place := f"{names[master]}/{_MASTER}") in tensors:
            raise SavedStateError(
                f"{_name_of(optimizer)} keeps something by the name {_MASTER!r}, by which the fp32 weight of the "
                f"16-bit {names[master]} is saved. Give it another name in self.state[parameter]."
            )
        tensors[place] = master.detach().cpu().contiguous()
    scalars["tensors"] = len(tensors)
    return tensors, scalars
