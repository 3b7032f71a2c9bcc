"""What an optimizer keeps in attributes, which no saved state holds: found wherever it lies, and compared."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OPTIMIZERS_OWN = ("state", "param_groups", "defaults")
"""Attributes of every optimizer that are saved, or made anew; others of torch's begin with an underscore."""
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_NOTHING = object()
_DEEP = 6
_MOST_OBJECTS = 10_000
"""That are looked into: more are data, not state."""


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers, texts and tensors (copied) in an optimizer's further attributes and in what its step hooks hold,
    by their place: none of them is saved."""
    found: dict[str, Any] = {}
    base = set(vars(torch.optim.SGD([nn.Parameter(torch.zeros(()))])))
    # an optimizer inside may share what is saved of this one
    saved = [optimizer, optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    seen = {id(each) for each in saved}
    labels = {
        id(p): f"p{nth}"
        for nth, p in enumerate([p for group in optimizer.param_groups for p in group["params"]])
    }
    for name, value in vars(optimizer).items():
        if (name not in base or name in _STEP_HOOKS) and name not in _OPTIMIZERS_OWN:
            _note(value, name, found, seen, labels, 0)
    return found


def _note(
    value: Any, place: str, found: dict[str, Any], seen: set[int], labels: Mapping[int, str], depth: int
) -> None:
    if isinstance(value, Tensor):
        found[place] = value.detach().clone()
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        found[place] = value
    elif isinstance(value, np.ndarray):
        found[place] = torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else str(value)
    elif isinstance(value, torch.Generator):
        found[place] = value.get_state()
    elif isinstance(value, random.Random):
        found[place] = str(value.getstate())
    elif isinstance(value, np.random.Generator | np.random.RandomState):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
        found[place] = str(bits.state)
    elif isinstance(value, type | types.ModuleType) or id(value) in seen or depth >= _DEEP:
        return
    elif len(seen) < _MOST_OBJECTS:
        seen.add(id(value))
        inner = _within(value, labels)
        if inner is None and " at 0x" not in (text := _text_of(value)):
            found[place] = text
        for label, each in inner or ():
            _note(each, f"{place}[{label}]", found, seen, labels, depth + 1)


def _within(value: Any, labels: Mapping[int, str]) -> list[tuple[Any, Any]] | None:
    """What an object holds, by labels that are the same in another one; None for what cannot be looked into.

    Args:
        labels: of the parameters, which are keys of mappings, by their ids.
    """
    if isinstance(value, Mapping):
        return [(labels.get(id(key), str(key)[:60]), each) for key, each in value.items()]
    if isinstance(value, list | tuple | deque):
        return list(enumerate(value))
    if isinstance(value, functools.partial):
        return list(enumerate((value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return list(enumerate((value.__self__, value.__func__)))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return list(enumerate((*cells, *(value.__defaults__ or ()))))
    given = [cls.__dict__.get("__slots__", ()) for cls in type(value).__mro__]
    slots = [name for names in given for name in ([names] if isinstance(names, str) else names)]
    if hasattr(value, "__dict__") or slots:
        held = getattr(value, "__dict__", {})
        return [*held.items(), *((name, getattr(value, name, None)) for name in slots)]
    return None


def _text_of(value: Any) -> str:
    """Of what has a state that only its text shows: ``count(5)``, a date, a set of names."""
    return str(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)


def differing_attribute(
    one: torch.optim.Optimizer, resumed: torch.optim.Optimizer, made: Mapping[str, Any]
) -> str:
    """Name of an attribute in which two optimizers differ that have come equally far; '' for none.

    Args:
        made: the attributes of ``one`` as it was made: a number that never moved since (the time, say) is no state.
    """
    mine, theirs = attributes_of(one), attributes_of(resumed)
    for place in [*mine, *theirs]:
        value, other = mine.get(place), theirs.get(place)
        moves = isinstance(value, Tensor) or not same_value(value, made.get(place))
        if moves and not same_value(value, other):
            return place.partition("[")[0]
    return ""


def moved_attributes(optimizer: torch.optim.Optimizer, made: Mapping[str, Any]) -> frozenset[str]:
    """Names of the attributes in which something is another than in ``made``, or is there since."""
    now = attributes_of(optimizer)
    places = [place for place in {**made, **now} if not same_value(now.get(place), made.get(place))]
    return frozenset(place.partition("[")[0] for place in places)


class LateAttributes:
    """Watches for attributes that begin to change in the run, where the trial's few steps showed nothing.

    Args:
        optimizer: as it was made.
        moves: names of those that changed in the trial: there a resume came to the same.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, moves: frozenset[str]) -> None:
        self._optimizer, self._moves = optimizer, moves
        self._begun = self._plain()

    def unsaved(self) -> str:
        """A sentence where there are such; else ''."""
        now = self._plain()
        others = [place for place, value in now.items() if value != self._begun.get(place, _NOTHING)]
        if not others:
            return ""
        names = ", ".join(sorted({place.partition("[")[0] for place in others})[:3])
        return (
            f"{type(self._optimizer).__name__} has begun to change {names}, and no saved state holds "
            "an optimizer's attributes: a resumed run goes on without it. Keep it in self.state[parameter]."
        )

    def _plain(self) -> dict[str, Any]:
        """Numbers and texts as they are, of tensors only that they are there."""
        return {
            place: "a tensor" if isinstance(value, Tensor) else value
            for place, value in attributes_of(self._optimizer).items()
            if (name := place.partition("[")[0]) not in self._moves and name not in _STEP_HOOKS
        }


def same_value(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
