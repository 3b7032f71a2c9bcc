"""A part of a saved state as files: nested mappings and lists of tensors and JSON values, and never a pickle."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gatrain.errors import SavedStateError
from gatrain.units import MIB

TENSOR = "__tensor__"
"""Key of the mapping that stands in the JSON for a tensor; its value is the tensor's name in the other file."""


_NO_FILES = (torch.complex128, torch.complex32)
"""Kinds of numbers that safetensors has no word for."""


def split(state: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Take a part apart: what JSON holds, and the tensors by their place, on the host.

    Args:
        state: mappings with text as keys, lists, tuples, tensors, numbers, text, booleans and None.
        where: whose state it is, for messages.

    Raises:
        SavedStateError: something else is in it; says where.
    """
    tensors: dict[str, Tensor] = {}

    def named(each: Tensor, place: str) -> Any:
        name = place or "tensor"
        while name in tensors:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = each.detach().cpu().contiguous()
        return {TENSOR: name}

    return _taken_apart(state, where, named), tensors


def check(state: Any, where: str) -> None:
    """Raise as `split` does; nothing is copied.

    Raises:
        SavedStateError: something is in it that no file can hold.
    """
    _taken_apart(state, where, lambda each, place: None)


def digest(state: Any, where: str) -> int:
    """32 bits of a part, of its tensors those of up to 1 MiB with every byte. Waits for the device.

    Raises:
        SavedStateError: as `split`.
    """

    def named(each: Tensor, place: str) -> Any:
        kind = [str(each.dtype), list(each.shape)]
        if not each.numel() or each.numel() * each.element_size() > MIB:
            return kind
        data = each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [*kind, zlib.crc32(data.tobytes())]

    return zlib.crc32(json.dumps(_taken_apart(state, where, named), sort_keys=True).encode())


def _taken_apart(state: Any, where: str, named: Callable[[Tensor, str], Any]) -> Any:
    def value(each: Any, place: str) -> Any:
        if isinstance(each, Tensor):
            if each.layout is not torch.strided or each.is_quantized or each.dtype in _NO_FILES:
                kind = each.dtype if each.layout is torch.strided else each.layout
                raise SavedStateError(
                    f"the state of {where} holds a tensor of {kind}{_at(place)}, which safetensors cannot: convert "
                    "it in state_dict() and back in load_state_dict(), for example by to_dense() or view_as_real()."
                )
            return named(each, place)
        if each is None or isinstance(each, bool | str) or type(each) in (int, float):
            return each
        if isinstance(each, list | tuple):
            return [value(item, f"{place}/{nth}" if place else str(nth)) for nth, item in enumerate(each)]
        if isinstance(each, Mapping):
            for key in each:
                if not isinstance(key, str) or key == TENSOR:
                    raise SavedStateError(
                        f"the state of {where} has the key {key!r}{_at(place)}: keys are text. Convert it in "
                        "state_dict() and back in load_state_dict()."
                    )
            return {key: value(item, f"{place}/{key}" if place else key) for key, item in each.items()}
        raise SavedStateError(
            f"the state of {where} holds a {type(each).__name__}{_at(place)}. A saved state takes tensors, "
            "numbers, text, booleans, None, and lists and mappings of these: convert it in state_dict()."
        )

    return value(state, "")


def join(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split`; tuples come back as lists.

    Raises:
        ValueError: a tensor is missing, is there twice, or belongs to nothing.
    """
    used: set[str] = set()

    def value(each: Any) -> Any:
        if isinstance(each, list):
            return [value(item) for item in each]
        if not isinstance(each, dict):
            return each
        if TENSOR not in each:
            return {key: value(item) for key, item in each.items()}
        name = each[TENSOR]
        if len(each) != 1 or not isinstance(name, str) or name not in tensors or name in used:
            raise ValueError(f"it names a tensor {str(name)[:60]!r} that it does not have")
        used.add(name)
        return tensors[name]

    joined = value(data)
    if left := tensors.keys() - used:
        raise ValueError(f"the tensor {min(left)[:60]!r} belongs to nothing")
    return joined


def _at(place: str) -> str:
    return f" at {place}" if place else ""
