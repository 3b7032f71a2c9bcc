"""What a forward may change besides its result: tensors of the model, and what model and task keep as attributes.

A loss that remembers (a counter, a moving average, a queue of embeddings) depends on how many micro-steps there
were before it, so on the split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_ITEMS = 1000
"""Longer lists are data, not state."""
MAX_OBJECTS = 20_000
MAX_KEPT_BYTES = 2**26
"""Larger tensors outside a module are data, not state."""
MAX_TRAINED_BYTES = 2**31
"""Trainable parameters are copied up to this size together: no forward should write to them."""
_DATA = ("train_data", "eval_data", "data")
_LIBRARIES = ("torch", "numpy", "builtins", "collections", "functools", "re", "logging", "PIL", "tokenizers")

Numbers = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class Slot:
    """One place that holds a value: an entry of a dict (attributes among them) or of a list."""

    owner: Any
    key: Any
    name: str
    value: Any
    copy: Tensor | None
    version: int

    def now(self) -> Any:
        try:
            return self.owner[self.key]
        except (KeyError, IndexError):
            return None

    def has_changed(self) -> bool:
        """Also true where something was written that happens to equal what was there."""
        now = self.now()
        if self.copy is None:
            is_nan = self.value != self.value and now != now
            return type(now) is not type(self.value) or (now != self.value and not is_nan)
        if not isinstance(now, Tensor) or now.data_ptr() != self.value.data_ptr():
            return True
        return now._version != self.version or not _equal(now, self.copy)

    def restore(self) -> None:
        if self.now() is not self.value:
            self.owner[self.key] = self.value
        if self.copy is not None and (
            self.value._version != self.version or not _equal(self.value, self.copy)
        ):
            self.value.data.copy_(self.copy)


class HeldState:
    """The values of all slots at one moment."""

    def __init__(self, *roots: Any) -> None:
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._trained_bytes = 0
        self.slots: list[Slot] = []
        for root in roots:
            self._walk(root, type(root).__name__)

    def changed(self) -> list[Slot]:
        """Slots that were written since, and all of a list or dict that has grown or shrunk."""
        resized = {id(container) for container, items in self._containers if len(container) != len(items)}
        return [slot for slot in self.slots if id(slot.owner) in resized or slot.has_changed()]

    def restore(self) -> None:
        """Put everything back."""
        for container, items in self._containers:
            if isinstance(container, dict):
                for key in [key for key in container if key not in items]:
                    del container[key]  # made meanwhile
                container.update({key: items[key] for key in items.keys() - container.keys()})
            elif len(container) != len(items):
                container.clear()
                container.extend(items)
        for slot in self.slots:
            slot.restore()

    def _walk(self, held: Any, name: str, depth: int = 0) -> None:
        if id(held) in self._seen or depth > 8 or len(self._seen) > MAX_OBJECTS:
            return
        self._seen.add(id(held))
        items = held if isinstance(held, dict | list | deque) else getattr(held, "__dict__", None)
        if not isinstance(items, dict | list | deque) or not _may_hold_state(held):
            return
        if len(items) > MAX_ITEMS:
            return
        self._containers.append((items, items.copy()))
        if isinstance(held, nn.Module):
            self._walk_tensors(held, name)
        for key, value in _entries(items):
            if key in _DATA or (key == "training" and isinstance(held, nn.Module)):
                continue  # the mode is set by whoever computes
            path = f"{name}[{key!r}]" if items is held else f"{name}.{key}"
            if isinstance(value, Tensor):
                if value.numel() * value.element_size() <= MAX_KEPT_BYTES:
                    self._add(items, key, path, value)
            elif isinstance(value, Numbers):
                self.slots.append(Slot(items, key, path, value, None, 0))
            elif not (isinstance(held, nn.Module) and key in ("_parameters", "_buffers")):
                below = name if key == "_modules" else path
                self._walk(value, below, depth + 1)

    def _walk_tensors(self, module: nn.Module, name: str) -> None:
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is not None:
                    self._add(group, key, f"{name}.{key}", tensor)

    def _add(self, owner: Any, key: Any, name: str, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.layout != torch.strided:
            return
        if tensor.requires_grad and tensor.is_leaf:
            self._trained_bytes += tensor.numel() * tensor.element_size()
            if self._trained_bytes > MAX_TRAINED_BYTES:
                return
        self.slots.append(Slot(owner, key, name, tensor, tensor.detach().clone(), tensor._version))


def perturb(slots: list[Slot]) -> None:
    """Change what was written, so that a loss that reads it shows."""
    for slot in slots:
        now = slot.now()
        if isinstance(now, bool) or not isinstance(now, int | float | Tensor):
            continue
        if isinstance(now, Tensor):
            if now.is_floating_point() and now.numel():
                spread = now.detach().double().abs().mean().item() or 1.0
                shift = torch.linspace(-spread, spread, now.numel(), dtype=torch.float64).view(now.shape)
                with torch.no_grad():
                    now.data.add_((0.3 * shift + 0.1 * spread).to(now.device, now.dtype))
            elif now.dim() == 0 and now.device.type == "cpu" and now.dtype != torch.bool:
                now.data.add_(1000)
        else:
            slot.owner[slot.key] = now + (1000 if isinstance(now, int) else 0.3 * (abs(now) or 1.0))


def _entries(items: Any) -> Iterator[tuple[Any, Any]]:
    yield from list(items.items()) if isinstance(items, dict) else list(enumerate(items))


def _may_hold_state(held: Any) -> bool:
    if isinstance(held, dict | list | deque | nn.Module):
        return True
    return type(held).__module__.partition(".")[0] not in _LIBRARIES and not isinstance(held, type)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one = one.detach()
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
