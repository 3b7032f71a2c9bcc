"""Writes down when each storage is made and given up while real code runs, on fake or real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gatrain.predict.timeline import FREED, Events, Work

_aten = torch.ops.aten
CONVOLUTIONS = (_aten.convolution, _aten.convolution_backward)


class Recorder(TorchDispatchMode):
    """Numbers storages in the order in which they appear; `events` lists what happened since `take`.

    Storages that existed before (`adopt`) or that an operation brings along are not counted.
    """

    def __init__(self, workspace_bytes: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, int] = {}  # address of the storage object to its number
        self._count = 0
        self._events: Events = []
        self._work = Work()
        self._workspace_bytes = workspace_bytes
        self._is_paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Lets compiled code run as compiled code under this mode."""
        return True

    def adopt(self, tensors: Iterable[Tensor]) -> list[int]:
        """Give storages that exist already a number; return the bytes of those that were new."""
        return [storage.nbytes() for storage in map(_storage, tensors) if self._add(storage)]

    def take(self) -> tuple[Events, Work]:
        """What happened since the last call."""
        events, work = self._events, self._work
        self._events, self._work = [], Work()
        return events, work

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made inside takes no memory: intermediate values of a fused kernel."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in leaves if leaf.device.type != "meta"]  # asked for to have no memory
        given = [leaf for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})) if isinstance(leaf, Tensor)]
        fresh = [result for result in results if _storage(result)._cdata not in self._known]
        if fresh:
            brought = {_storage(tensor)._cdata for tensor in given}
            fresh = [result for result in fresh if _storage(result)._cdata not in brought]
        if self._is_paused:
            for result in fresh:
                self._add(_storage(result), silent=True)
            return out
        for result in fresh:
            storage = _storage(result)
            if self._add(storage):
                self._events.append((self._known[storage._cdata], storage.nbytes()))
        if fresh or func._schema.is_mutable:  # anything else is a view
            self._note_work(func, args, kwargs or {}, out, given + fresh)
            for extra in _temporaries(func, args, self._workspace_bytes):
                self._count += 1
                self._events += [(self._count, extra), (self._count, FREED)]
        return out

    def _add(self, storage: Any, silent: bool = False) -> bool:
        key = storage._cdata
        if key in self._known:
            return False
        self._count += 1
        self._known[key] = self._count
        weakref.finalize(storage, self._forget, key, silent)
        return True

    def _forget(self, key: int, silent: bool) -> None:
        number = self._known.pop(key, None)
        if number is not None and not silent:
            self._events.append((number, FREED))

    def _note_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, tensors: list[Tensor]
    ) -> None:
        moved = sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is None:
            self._work.other_bytes += moved
            self._work.other_kernels += 1
            return
        flops = int(formula(*args, **kwargs, out_val=out))
        self._work.products.append((flops, moved))


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _temporaries(func: Any, args: tuple[Any, ...], workspace_bytes: int) -> list[int]:
    """Bytes that a CUDA kernel takes for itself while it runs, besides its results.

    Flash attention's backward sums dq in fp32, padded to 128 positions and 32 channels, and keeps one number a
    row (``flash_api.cpp``); convolutions take a workspace.
    """
    packet = func._overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        batch, heads, length, width = args[1].shape
        rows = batch * heads * (-(-length // 128) * 128)
        return [4 * rows, 4 * rows * (-(-width // 32) * 32)]
    if packet in CONVOLUTIONS and workspace_bytes:
        return [workspace_bytes]
    return []
