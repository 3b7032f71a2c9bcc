"""Activations kept in main memory between forward and backward: ``checkpointing: offload``.

Autograd hands over each tensor that it keeps for the backward and takes back an equal one
(`torch.autograd.graph.saved_tensors_hooks`): the same numbers, so the same gradient, bit for bit. It costs
transfers over the bus and no arithmetic. On a GPU they run beside the computation, on a stream of their own and
through pinned memory; the backward asks for tensors in about the reverse order, so the ones before the one in hand
are already on their way back.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Context = Callable[[], AbstractContextManager[Any]]

MIN_BYTES = 2**20
"""Smaller tensors stay: a transfer costs some ten microseconds whatever its size."""
AHEAD = 2
"""Tensors that are on their way back before they are asked for."""


def forward_context(mode: str, model: nn.Module, context: Context) -> Context:
    """The context of a forward in a mode of checkpointing, around another one such as autocast."""
    if mode != "offload":
        return context
    offloading = Offloading(model)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with context(), offloading.forward():
            yield

    return both


class Offloading:
    """Takes what a model's forwards keep to main memory and back.

    Tensors stay where they are that are small, that share memory with a parameter or a buffer, that show one number
    several times (expanded ones), and that lie elsewhere than the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        # one stream for both directions: a copy back comes after the copy out of the same tensor
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @contextlib.contextmanager
    def forward(self, limit_bytes: float = math.inf) -> Iterator[None]:
        """Around a forward; its backward needs no context.

        Args:
            limit_bytes: what it keeps after that many are taken away stays.
        """
        left = limit_bytes
        held = {t.untyped_storage().data_ptr() for t in (*self._model.parameters(), *self._model.buffers())}
        # in the order of the forward; the graph alone keeps them, each until its part of the backward is done
        taken: list[weakref.ref[_Away]] = []
        known: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Away]]] = {}

        def pack(tensor: Tensor) -> _Here | _Away:
            nonlocal left
            size = tensor.numel() * tensor.element_size()
            storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
            if (
                left <= 0
                or size < MIN_BYTES
                or tensor.device != self._device
                or storage is None
                or type(tensor) not in (Tensor, nn.Parameter)
                or size > storage.nbytes()
                or storage.data_ptr() in held
            ):
                return _Here(tensor)
            # an activation is often kept twice, by what made it and by what takes it: one copy serves both
            form = tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            key = storage._cdata, form
            if key in known:
                source, copied = known[key]
                if not source.expired() and (away := copied()) is not None:
                    return away
            left -= size
            away = _Away(tensor, self._stream, taken)
            taken.append(weakref.ref(away))
            # the reference keeps the storage's address, not its memory: no other storage gets the address meanwhile
            known[key] = StorageWeakRef(storage), taken[-1]
            return away

        def unpack(packed: _Here | _Away) -> Tensor:
            return packed.tensor()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class _Here:
    """One tensor that stays. Autograd looks for changes of what it keeps only where it has no hooks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def tensor(self) -> Tensor:
        """
        Raises:
            RuntimeError: it was written to since, so that the gradient would be wrong.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{list(self._tensor.shape)}"
            )
        return self._tensor


class _Away:
    """One tensor in main memory.

    Args:
        tensor: on the device.
        stream: for its transfers; None on a CPU, where it is copied at once.
        taken: those that the same forward took away before, in order.
    """

    def __init__(
        self, tensor: Tensor, stream: torch.cuda.Stream | None, taken: list[weakref.ref[_Away]]
    ) -> None:
        self._stream, self._taken, self._place = stream, taken, len(taken)
        self._device = tensor.device
        self._back: tuple[Tensor, torch.cuda.Event] | None = None
        self._was_used = False
        if stream is None:
            self._host = tensor.detach().clone(memory_format=torch.preserve_format)
            return
        source = tensor.detach()
        self._host = torch.empty_like(source, device="cpu", pin_memory=True)  # the same strides where dense
        stream.wait_stream(torch.cuda.current_stream(self._device))  # the tensor is computed by then
        with torch.cuda.stream(stream):
            self._host.copy_(source, non_blocking=True)
        # the allocator gives its memory away only after the copy; the host's own waits for events alike
        source.record_stream(stream)

    def tensor(self) -> Tensor:
        """An equal tensor on the device, for use on the current stream."""
        if self._stream is None:
            return self._host
        self._fetch()
        for other in self._taken[max(0, self._place - AHEAD) : self._place]:
            if (away := other()) is not None and not away._was_used:
                away._fetch()
        assert self._back is not None
        back, ready = self._back
        self._back, self._was_used = None, True  # asked for once more, it is copied once more
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ready)
        back.record_stream(current)  # it was allocated on the other stream
        return back

    def _fetch(self) -> None:
        if self._back is not None or self._stream is None:
            return
        with torch.cuda.stream(
            self._stream
        ):  # allocated there, so that it is written after what lay there before
            back = torch.empty_like(self._host, device=self._device)
            back.copy_(self._host, non_blocking=True)
            self._back = back, self._stream.record_event()
