"""Writes down when each storage is made and given up while real code runs, on fake or real tensors."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gatrain.predict.timeline import FREED, GRADIENT, WORKSPACE, Events, Work

_aten = torch.ops.aten
_ADD = _aten.add.Tensor
_DEVICE_OF = torch.ops.prim.device.default
CONVOLUTIONS = (_aten.convolution, _aten.convolution_backward)
LAYER_NORMS = (_aten.native_layer_norm, _aten.native_layer_norm_backward)
GROUP_NORMS = (_aten.native_group_norm, _aten.native_group_norm_backward)
CHANNELS = 8
"""Tensor cores take channels by so many: missing ones are filled up."""
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
        self._holders_of_unshared = _holders_of_unshared()

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

    def _note_traffic(self, sizes: Iterable[int], kernels: int) -> None:
        """Count bytes that are read or written, besides what is seen of operations."""
        for size in sizes:
            self._work.other_bytes += size
            self._work.other_constant += size if size % self.micro_batch else 0
        self._work.other_kernels += kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the autograd engine asks three times for each operation
        kwargs = kwargs or {}
        adds_in_place = func is _ADD and self._adds_in_place(args)
        out = func(*args, **kwargs)
        if adds_in_place:
            self._replace(_storage(args[0]), _storage(out))
            self._note_work(func, args, kwargs, out, [*args[:2], out])
        # tensors on "meta" were asked for to have no memory
        results = [leaf for leaf in _tensors(out) if leaf.device.type != "meta"]
        fresh = [result for result in results if _storage(result)._cdata not in self._known]
        if not fresh and not func._schema.is_mutable:
            return out  # a view
        given = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if fresh:
            brought = {_storage(tensor)._cdata for tensor in given}
            fresh = [result for result in fresh if _storage(result)._cdata not in brought]
        for result in fresh:
            storage = _storage(result)
            if self._add(storage):
                self._events.append((self._known[storage._cdata], storage.nbytes()))
                self.largest_elements = max(self.largest_elements, result.numel())
        if func._overloadpacket in CUBLAS:
            self._note_workspace()  # the kernel asks for it, with its result made
        if fresh or func._schema.is_mutable:
            self._note_work(func, args, kwargs, out, given + fresh)
            for together in _temporaries(func, args, out):
                if func._overloadpacket in CONVOLUTIONS:
                    self._note_traffic([2 * size for size in together], len(together))  # read, and written
                numbers = range(self._count + 1, self._count + 1 + len(together))
                self._count += len(together)
                self._events += [*zip(numbers, together, strict=True), *((n, FREED) for n in numbers)]
        return out

    def _note_workspace(self) -> None:
        """cuBLAS has a handle, and so a workspace, for the thread of the forward and for that of the backward."""
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward not in self._has_workspace:
            self._has_workspace.add(is_backward)
            self._events.append((int(is_backward), WORKSPACE))

    def _adds_in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether PyTorch adds in place here, as it does but for subclasses of Tensor and under dispatch modes.

        The autograd engine does so with a second gradient of a value, if it alone holds the first
        (``torch/csrc/autograd/input_buffer.cpp``), and ``linear`` with its bias (``native/Linear.cpp``).
        """
        first, second = args[0], args[1]
        if not isinstance(second, Tensor) or first.dtype != second.dtype:
            return False
        in_engine = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        is_sum = in_engine and first.shape == second.shape
        is_bias = first.dim() > 1 and second.shape == first.shape[-1:]
        if not (is_sum or is_bias) or _storage(first).nbytes() != _bytes(first):
            return False
        return _holders(first) == self._holders_of_unshared

    def _replace(self, old: Any, new: Any) -> None:
        """The new storage is the old one: what was written of that goes on under its number."""
        number = self._known.pop(old._cdata, None)
        if number is not None:
            self._known[new._cdata] = number
            weakref.finalize(new, self._forget, new._cdata)

    def _add(self, storage: Any) -> bool:
        key = storage._cdata
        if key in self._known:
            return False
        self._count += 1
        self._known[key] = self._count
        weakref.finalize(storage, self._forget, key)
        return True

    def _forget(self, key: int) -> None:
        number = self._known.pop(key, None)
        if number is not None:
            self._events.append((number, FREED))

    def _note_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, tensors: list[Tensor]
    ) -> None:
        sizes = {id(tensor): _bytes(tensor) for tensor in tensors}.values()
        moved = sum(sizes)
        constant = sum(size for size in sizes if size % self.micro_batch)
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


def _holders(tensor: Tensor) -> tuple[int, int, int]:
    """How many hold a tensor in Python, hold it in C++, and hold its storage; this call included."""
    storage = _storage(tensor)
    return sys.getrefcount(tensor), tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def _holders_of_unshared() -> tuple[int, int, int]:
    """What `_holders` says, in a dispatch mode, of a gradient that the autograd engine alone holds."""
    found: list[tuple[int, int, int]] = []

    class Asks(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD and torch._C._current_graph_task_id() != -1:
                self.ask(args)
            return func(*args, **(kwargs or {}))

        def ask(self, args: tuple[Any, ...]) -> None:
            first, _ = args[0], args[1]  # as many names as in `Recorder._adds_in_place`
            found.append(_holders(first))

    with torch.enable_grad(), FakeTensorMode():
        value = torch.ones(2, requires_grad=True)
        with Asks():  # type: ignore[no-untyped-call]
            (value.relu() + value.sigmoid()).sum().backward()
    return next(iter(found), (0, 0, 0))  # like no tensor's, should an engine do without


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


def _temporaries(func: Any, args: tuple[Any, ...], out: Any) -> list[list[int]]:
    """Bytes that a CUDA kernel takes for itself while it runs, besides its results; each list at one time.

    Flash attention's backward sums dq in fp32, padded to 128 positions and 32 channels, and keeps one number a
    row (``flash_api.cpp``).

    cuDNN's tensor-core convolutions want the channels last, so for PyTorch's usual layout in 16 bits cuDNN copies
    what it reads and writes (kernels ``nchwToNhwc`` and ``nhwcToNchw``) in a workspace: traffic as well. Where it
    does, and how large that is, was read off every allocation of a ResNet-50 (128 images, H100, torch 2.11,
    2026-11-26); for other shapes, GPUs and versions it is an ASSUMPTION. What is left out are partial sums of
    weights' gradients, up to 13 times a weight in fp32.
    """
    packet = func._overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_backward:
        batch, heads, length, width = args[1].shape
        rows = batch * heads * (-(-length // 128) * 128)
        return [[4 * rows, 4 * rows * (-(-width // 32) * 32)]]
    if packet in LAYER_NORMS + GROUP_NORMS:
        is_backward = "backward" in packet.__name__
        # the kernels want rows beside each other, and copy what comes otherwise
        sizes = [_bytes(t) for t in args[: 1 + is_backward] if not t.is_contiguous()]
        if packet in GROUP_NORMS:
            samples, channels = args[5:7] if is_backward else args[3:5]
            sizes += [4 * samples * channels] * (3 if is_backward else 2)  # fp32 sums of each channel
        return [sizes]
    if packet is _aten.convolution and _is_copied(args[0]):
        data, weight, stride = args[0], args[1], args[3]
        return [[_copies_bytes(data, out, weight)]] if _needs_copies(weight, stride, out) else []
    if packet is _aten.convolution_backward and _is_copied(args[1]):
        gradient, data, weight, stride = *args[:3], args[4]
        copies = _copies_bytes(gradient, data, weight)
        for_input, for_weight = (result is not None for result in out[:2])
        if _needs_copies(weight, stride, gradient):
            return [[copies]] * (for_input + for_weight)
        # the weight's gradient is then a product for each sample, if they take less, and their sum in fp32
        return [[min(4 * data.shape[0] * weight.numel(), copies)]] * for_weight
    return []


def _copies_bytes(data: Tensor, out: Tensor, weight: Tensor) -> int:
    """Bytes of the three with the channels, their second dimension, last and filled up."""
    tensors = [data, out] if _has_one_pixel(weight) else [data, out, weight]
    return sum(_bytes(t) // t.shape[1] * (-(-t.shape[1] // CHANNELS) * CHANNELS) for t in tensors)


def _has_one_pixel(weight: Tensor) -> bool:
    """Such a weight is laid out alike either way."""
    return math.prod(weight.shape[2:]) == 1


def _needs_copies(weight: Tensor, stride: list[int], out: Tensor) -> bool:
    """A convolution with one pixel, no stride and an even number of pixels is a matrix product as it is."""
    return not _has_one_pixel(weight) or max(stride) > 1 or math.prod(out.shape[2:]) % 2 == 1


def _is_copied(tensor: Tensor) -> bool:
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    return is_half and tensor.dim() == 4 and not tensor.is_contiguous(memory_format=torch.channels_last)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
