"""Batches of any form: the one walk over the tensors of nested dicts, tuples, dataclasses and other objects."""

from __future__ import annotations

import copy
import enum
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gatrain.tasks.base import Batch

_LEAVES = (
    *(
        str,
        bytes,
        bytearray,
        int,
        float,
        complex,
        type(None),
        np.ndarray,
        np.generic,
        torch.device,
        torch.dtype,
    ),
    *(type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType, nn.Module),
)


def parts_of(nested: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]] | None:
    """The parts of a container or object, and a function that makes the same thing of other parts.

    None for a leaf: a tensor, a number, a string, or an object without attributes.
    """
    if isinstance(nested, (Tensor, *_LEAVES)):
        return None
    if isinstance(nested, PackedSequence):  # its batch sizes belong to the host
        parts = [nested.data, nested.sorted_indices, nested.unsorted_indices]
        return parts, lambda new: PackedSequence(new[0], nested.batch_sizes, new[1], new[2])
    if isinstance(nested, Mapping):
        keys = list(nested)
        return [nested[key] for key in keys], lambda new: _mapping_like(
            nested, dict(zip(keys, new, strict=True))
        )
    if isinstance(nested, tuple):
        kind = type(nested)
        return list(nested), kind._make if hasattr(kind, "_make") else kind
    if isinstance(nested, list | deque):
        return list(nested), type(nested)
    names = _attribute_names(nested)
    if not names:
        return None
    return [getattr(nested, name) for name in names], lambda new: _object_like(nested, names, new)


def _mapping_like(given: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(given) is dict:
        return values
    if isinstance(given, MutableMapping):
        made = copy.copy(given)
        for key, value in values.items():
            made[key] = value
        return made
    try:
        return type(given)(values)  # type: ignore[call-arg]
    except TypeError:
        return values


def _attribute_names(given: Any) -> list[str]:
    slots = [name for kind in type(given).__mro__ for name in _slots(kind) if hasattr(given, name)]
    return [*getattr(given, "__dict__", {}), *slots]


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _object_like(given: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    made = copy.copy(given)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen dataclasses too
    return made


def map_tensors(
    change: Callable[[Tensor], Tensor], nested: Any, own: Callable[[Any], Any] | None = None
) -> Any:
    """``nested`` with ``change`` applied to every tensor, of the same types; unchanged parts are not copied.

    Args:
        own: given each object that is no plain container; what it returns stands for the object, None says
            that the object has no way of its own.
    """
    done: dict[int, tuple[Any, Any]] = {}  # with the original, so that its id is not given to another

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if id(value) in done:
            return done[id(value)][1]
        if own is not None and _is_object(value) and (made := own(value)) is not None:
            done[id(value)] = value, made
            return made
        found = parts_of(value)
        if found is None:
            return value
        done[id(value)] = value, value  # an object may hold itself
        parts, rebuild = found
        changed = [walk(part) for part in parts]
        if any(new is not old for new, old in zip(changed, parts, strict=True)):
            done[id(value)] = value, rebuild(changed)
        return done[id(value)][1]

    return walk(nested)


def tensors_of(nested: Any) -> Iterator[Tensor]:
    """Every tensor of a batch that can be seen from outside, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, nested)
    return iter(found)


def bytes_of(nested: Any) -> int:
    """Bytes of all tensors of a batch."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(nested))


def move_to(batch: Batch, device: torch.device | str) -> Batch:
    """Copy every tensor of a nested batch to ``device``, without waiting where its memory is pinned.

    An object with a ``.to()`` of its own is moved by it, on a copy: some change themselves.
    """
    return map_tensors(
        lambda tensor: tensor.to(device, non_blocking=True),
        batch,
        lambda value: _moved_by_itself(value, device),
    )


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, where it is in ordinary host memory."""
    return map_tensors(_pin, batch, lambda value: value.pin_memory() if _has(value, "pin_memory") else None)


def moves_itself(batch: Batch) -> bool:
    """Whether parts of a batch are moved by a ``.to()`` of their own, which may hold tensors out of sight."""
    found: list[Any] = []

    def look(value: Any) -> Any:
        if _has(value, "to"):
            found.append(value)
            return value
        return None

    map_tensors(lambda tensor: tensor, batch, look)
    return bool(found)


def _moved_by_itself(value: Any, device: torch.device | str) -> Any:
    if not _has(value, "to"):
        return None
    twin = copy.copy(value)
    try:
        waits = "non_blocking" not in inspect.signature(twin.to).parameters
    except (TypeError, ValueError):
        waits = True
    moved = twin.to(device) if waits else twin.to(device, non_blocking=True)
    return twin if moved is None else moved


def _pin(tensor: Tensor) -> Tensor:
    is_ordinary = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_nested
    return tensor.pin_memory() if is_ordinary else tensor


def _is_object(value: Any) -> bool:
    if isinstance(value, Mapping | tuple | list | deque | PackedSequence):
        return False
    return not isinstance(value, _LEAVES)


def _has(value: Any, method: str) -> bool:
    return callable(getattr(type(value), method, None))
