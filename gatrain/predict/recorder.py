"""Writes down when each storage is made and given up while real code runs, on fake or real tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gatrain.predict.timeline import FREED, GRADIENT, WORKSPACE, Events, Work

_aten = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default
CONVOLUTIONS = (_aten.convolution, _aten.convolution_backward)
CUBLAS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


class Recorder(TorchDispatchMode):
    """Numbers storages in the order in which they appear; `events` lists what happened since `take`.

    Storages that existed before (`adopt`) or that an operation brings along are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.micro_batch = 1
        """Of the batch that is traced: what it does not divide does not grow with the batch."""
        self.largest_elements = 0
        self._known: dict[int, int] = {}  # address of the storage object to its number
        self._count = 0
        self._events: Events = []
        self._work = Work()
        self._has_workspace: set[bool] = set()
        self._is_paused = False
        self._copies_layouts = True
        self._counts_work = True

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
        self.largest_elements = 0
        self._has_workspace = set()
        return events, work

    def mark_gradient(self, parameter: Tensor) -> None:
        """A parameter has its gradient: called by the autograd engine, right after it was kept or added."""
        if parameter.grad is not None:
            number = self._known.get(_storage(parameter.grad)._cdata)
            if number is not None:
                self._events.append((number, GRADIENT))

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made inside takes no memory: intermediate values of a fused kernel."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def note_traffic(self, sizes: Iterable[int], kernels: int) -> None:
        """Count bytes that are read or written, besides what is seen of operations."""
        for size in sizes:
            self._work.other_bytes += size
            self._work.other_constant += size if size % self.micro_batch else 0
        self._work.other_kernels += kernels

    @contextmanager
    def without_work(self) -> Iterator[None]:
        """What is called inside takes memory, and the caller counts what it moves: `note_traffic`."""
        self._counts_work = False
        try:
            yield
        finally:
            self._counts_work = True

    @contextmanager
    def in_best_layout(self) -> Iterator[None]:
        """What is called inside gets its operands as it likes them best: the compiler chooses their layout."""
        self._copies_layouts = False
        try:
            yield
        finally:
            self._copies_layouts = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the autograd engine asks three times for each operation
        if func._overloadpacket in CUBLAS:
            self._note_workspace()
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # tensors on "meta" were asked for to have no memory
        results = [leaf for leaf in _tensors(out) if leaf.device.type != "meta"]
        fresh = [result for result in results if _storage(result)._cdata not in self._known]
        if not fresh and not func._schema.is_mutable:
            return out  # a view
        given = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
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
                self.largest_elements = max(self.largest_elements, result.numel())
        if fresh or func._schema.is_mutable:
            self._note_work(func, args, kwargs, out, given + fresh)
            for together in _temporaries(func, args, out, self._copies_layouts):
                if func._overloadpacket in CONVOLUTIONS:
                    self.note_traffic([2 * size for size in together], len(together))  # read, and written
                numbers = range(self._count + 1, self._count + 1 + len(together))
                self._count += len(together)
                self._events += [*zip(numbers, together, strict=True), *((n, FREED) for n in numbers)]
        return out

    def _note_workspace(self) -> None:
        """cuBLAS has a handle, and so a workspace, for the thread of the forward and for that of the backward."""
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward not in self._has_workspace and not self._is_paused:
            self._has_workspace.add(is_backward)
            self._events.append((int(is_backward), WORKSPACE))

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
        sizes = {id(tensor): _bytes(tensor) for tensor in tensors}.values()
        moved = sum(sizes)
        constant = sum(size for size in sizes if size % self.micro_batch)
        if not self._counts_work:
            return
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is None:
            self._work.other_bytes += moved
            self._work.other_constant += constant
            self._work.other_kernels += 1
            return
        flops = int(formula(*args, **kwargs, out_val=out))
        self._work.products.append((flops, moved))
        self._work.constants.append(constant)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operation, which are nested once at most."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, tuple | list):
        return []
    return [
        leaf
        for each in value
        for leaf in (each if isinstance(each, tuple | list) else (each,))
        if isinstance(leaf, Tensor)
    ]


def _temporaries(func: Any, args: tuple[Any, ...], out: Any, copies_layouts: bool) -> list[list[int]]:
    """Bytes that a CUDA kernel takes for itself while it runs, besides its results; each list at one time.

    Flash attention's backward sums dq in fp32, padded to 128 positions and 32 channels, and keeps one number a
    row (``flash_api.cpp``).

    cuDNN's tensor-core convolutions want the channels last, so for PyTorch's usual layout in 16 bits cuDNN copies
    what it reads and writes (kernels ``nchwToNhwc`` and ``nhwcToNchw``) in a workspace: traffic as well. That
    they are of the size of the operands is an ASSUMPTION. Seen on 2026-11-24 (ResNet-50 at 64 and 128, H100, torch
    2.11): the peak of what is allocated falls where they do not matter, and agrees to 0.6 %.
    """
    packet = func._overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        batch, heads, length, width = args[1].shape
        rows = batch * heads * (-(-length // 128) * 128)
        return [[4 * rows, 4 * rows * (-(-width // 32) * 32)]]
    if not copies_layouts:
        return []
    if packet is _aten.convolution and _is_copied(args[0]):
        return [[_bytes(args[0]) + _bytes(args[1]) + _bytes(out)]]
    if packet is _aten.convolution_backward and _is_copied(args[1]):
        gradient, data, weight = (_bytes(tensor) for tensor in args[:3])
        wanted = [result for result in out[:2] if result is not None]  # for the input, for the weight
        return [[gradient + data + weight] for _ in wanted]
    return []


def _is_copied(tensor: Tensor) -> bool:
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return is_half and tensor.dim() == 4 and not tensor.is_contiguous(memory_format=torch.channels_last)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
