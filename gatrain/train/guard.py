"""Keeps a window that is not finite out of the parameters, the optimizer and the model's buffers.

The reduced gradient's norm is the same on every rank, and whether any loss is bad is agreed on the device, so all
decide alike. There are two ways:

- at once: the host reads the norm and makes the update or leaves it out. Free on a CPU. On a GPU it waits for the
  device once a window: that is for ``train.nonfinite=skip``, where the next window's learning rate depends on the
  answer, and for fp16, whose window may have to be computed again at a lower loss scale. The wait comes after the
  last micro-step, so what it costs is the launch of the next kernels, once a step: on an H100 no more than the
  noise (GPT-2 124M, 16 samples, fp16: 61 to 66 ms with it, 60 to 61 without; a step of 10 ms: no difference).
- later: the optimizer's fused kernels read the verdict on the device, and the host learns of it with the metrics.
  From the first bad window on no update is made, so that everything is as it was before that window.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Guard:
    """Makes the update of a window if its gradient is finite.

    Args:
        at_once: read the verdict on the host at each window.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, at_once: bool
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        # only fused kernels take the verdict from the device
        self._fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._at_once = at_once or not self._fused
        self._stopped: Tensor | None = None
        """On the device: 1.0 after a window that was not finite."""
        self._kept: dict[torch.dtype, _Kept] = {}

    @property
    def stopped(self) -> Tensor | None:
        """On the device: above 0 from the first window on that was not finite. None where the host knows."""
        return None if self._at_once else self._stopped

    def decide_at_once(self) -> None:
        """From here on read the verdict on the host at each window."""
        self._at_once = True

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Remember the buffers before a window: its forward moves BatchNorm's statistics, NaN included."""
        for dtype, buffers in _by_dtype(_buffers_of(self._model)).items():
            kept = self._kept.get(dtype)
            if kept is None or not kept.are_like(buffers):
                self._kept[dtype] = _Kept(buffers)
            else:
                kept.take(buffers, self._stopped)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back as they were before the window that was not finite."""
        for dtype, buffers in _by_dtype(_buffers_of(self._model)).items():
            kept = self._kept.get(dtype)
            if kept is not None and kept.are_like(
                buffers
            ):  # else the forward made others: there is no way back
                torch._foreach_copy_(buffers, kept.parts)

    def step(self, norm: Tensor, loss_is_bad: Tensor | None = None) -> bool:
        """Let the optimizer step where ``norm``, the gradient's, and the loss are finite.

        Returns:
            Whether an update was made; True where only the device knows as yet.
        """
        bad = ~torch.isfinite(norm).to(self._device)
        if loss_is_bad is not None:
            bad = bad | loss_is_bad
        if self._at_once:
            if bad:
                return False
            self._optimizer.step()
            return True
        found = bad.to(torch.float32)
        self._stopped = found if self._stopped is None else torch.maximum(self._stopped, found)
        self._optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
        return True


class _Kept:
    """Copies of buffers of one dtype: taken in one call, since a small model has more buffers than time."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._shapes = [buffer.shape for buffer in buffers]
        self._flat, self.parts = self._room(buffers)
        self._new: tuple[Tensor, list[Tensor]] | None = None
        torch._foreach_copy_(self.parts, buffers)

    def _room(self, buffers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        sizes = [buffer.numel() for buffer in buffers]
        flat = torch.empty(sum(sizes), dtype=buffers[0].dtype, device=buffers[0].device)
        return flat, [part.view(s) for part, s in zip(flat.split(sizes), self._shapes, strict=True)]

    def are_like(self, buffers: list[Tensor]) -> bool:
        return self._shapes == [buffer.shape for buffer in buffers]

    def take(self, buffers: list[Tensor], stopped: Tensor | None) -> None:
        """Copy the buffers, unless ``stopped`` is above 0, which only the device may know."""
        if stopped is None:
            torch._foreach_copy_(self.parts, buffers)
            return
        flat, parts = self._new = self._new or self._room(buffers)
        torch._foreach_copy_(parts, buffers)
        torch.where(stopped > 0, self._flat, flat, out=self._flat)


def _buffers_of(model: nn.Module) -> Iterable[Tensor]:
    """As `nn.Module.buffers`, each once; without the names, which take most of its time."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for buffer in module._buffers.values():
            if buffer is not None:
                found[id(buffer)] = buffer
        waiting += [child for child in module._modules.values() if child is not None]
    return found.values()


def _by_dtype(buffers: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Those that a forward may move; what has one byte an element is a mask or a frozen quantised weight."""
    grouped: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        if buffer.layout == torch.strided and buffer.numel() and buffer.element_size() > 1:
            grouped.setdefault(buffer.dtype, []).append(buffer)
    return grouped
