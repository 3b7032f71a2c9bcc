"""An exponential moving average of the weights: updated once an optimizer step, whatever the split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, SavedStateError
from gatrain.train.hook import Hook, HookRun, TrainedStep

CHUNK_BYTES = 64 * 2**20
"""Of weights that are averaged at once where their difference needs memory of its own."""


class EMA(Hook):
    """Keeps ``average = decay * average + (1 - decay) * weights``, evaluates with it and exports it.

    The average is of what the optimizer steps, in fp32 for 16-bit parameters. Evaluations get ``ema.loss`` and so
    on beside the model's own numbers, and each saved state a file ``ema.safetensors`` with the averaged weights
    under the model's names.

    Args:
        decay: from 0 to below 1. It belongs to the effective batch: an average over about 1 / (1 - decay) steps.
        warmup: a smaller decay at first, (1 + n) / (10 + n) after n updates (as in TensorFlow's
            ExponentialMovingAverage), so that the initial weights are soon forgotten.
        buffers: of BatchNorm and the like: ``copy`` takes the model's as they are, ``average`` averages those of
            floating point as the weights.
        evaluate: also evaluate with the average; it takes as long as the evaluation of the model.
        name: of the file and before the evaluation's numbers.
    """

    needs_verdict = False  # a window that turns out to be not finite is left out on the device

    def __init__(
        self,
        decay: float = 0.999,
        warmup: bool = False,
        buffers: str = "copy",
        evaluate: bool = True,
        name: str = "ema",
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema: decay={decay} is not from 0 to below 1.")
        if buffers not in ("copy", "average"):
            raise ConfigError(f"ema: buffers={buffers} is not one of copy, average.")
        self._decay, self._warmup, self._evaluate, self._name = decay, warmup, evaluate, name
        self._averages_buffers = buffers == "average"
        self._buffers: dict[str, Tensor] = {}

    def device_bytes(self, model: nn.Module) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        held = sum(p.numel() * max(4, p.element_size()) for p in trained)
        return held + min(held, CHUNK_BYTES)

    def start(self, run: HookRun) -> None:
        self._model, self._trained = run.model, dict(run.trained)
        self._averages = {name: weight.detach().clone() for name, weight in run.trained.items()}
        if self._averages_buffers:
            self._buffers = {name: buffer.detach().clone() for name, buffer in self._model_buffers().items()}

    def update(self, step: TrainedStep) -> None:
        decay = min(self._decay, (1 + step.updates) / (10 + step.updates)) if self._warmup else self._decay
        averages, weights = list(self._averages.values()), list(self._trained.values())
        if step.left_out is None:
            torch._foreach_lerp_(averages, weights, 1 - decay)
            self._update_buffers(1 - decay, None)
            return
        # the host does not know yet whether the window was finite: where it was not, the average stays as it is
        is_made = step.left_out == 0
        rate = is_made * torch.full((), 1 - decay, dtype=torch.float32, device=is_made.device)
        for part in _chunks(averages):
            difference = torch._foreach_sub(weights[part], averages[part])
            torch._foreach_mul_(difference, rate)
            torch._foreach_add_(averages[part], difference)
        self._update_buffers(1 - decay, is_made)

    def weights(self) -> dict[str, contextlib.AbstractContextManager[None]]:
        return {self._name: self._in_place()} if self._evaluate else {}

    @torch.no_grad()
    def exports(self) -> dict[str, Mapping[str, Tensor]]:
        """The average under the names of the model's state dict, in the model's types."""
        averages = {}
        for name, parameter in self._model.named_parameters():
            if name in self._averages:
                averages[id(parameter)] = self._averages[name].to(parameter.dtype)
        state = self._model.state_dict(keep_vars=True)
        found = {name: averages.get(id(value), value.detach()) for name, value in state.items()}
        return {self._name: found | {name: value for name, value in self._buffers.items() if name in found}}

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages, "buffers": self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, part in ((self._averages, "averages"), (self._buffers, "buffers")):
            given = state.get(part)
            if not isinstance(given, dict) or given.keys() != mine.keys():
                raise SavedStateError(
                    f"the saved state's {part} of the hook {self._name} are of another model."
                )
            for name, value in given.items():
                if not isinstance(value, Tensor) or value.shape != mine[name].shape:
                    raise SavedStateError(f"the saved state's average of {name} is not of its shape.")
                if value.dtype != mine[name].dtype or not bool(torch.isfinite(value).all()):
                    raise SavedStateError(
                        f"the saved state's average of {name} has values that it cannot have."
                    )
                mine[name].copy_(value)

    def _model_buffers(self) -> dict[str, Tensor]:
        kept = self._model.state_dict()  # without those that are not saved: they are no part of the weights
        return {
            name: buffer
            for name, buffer in self._model.named_buffers()
            if name in kept and buffer.is_floating_point()
        }

    def _update_buffers(self, rate: float, is_made: Tensor | None) -> None:
        """Those of a window that was not finite may hold NaN, which no factor of 0 takes out."""
        if not self._averages_buffers:
            return
        now = self._model_buffers()
        for name, average in self._buffers.items():
            moved = torch.lerp(average, now[name], rate)
            average.copy_(moved if is_made is None else torch.where(is_made, moved, average))

    @contextlib.contextmanager
    @torch.no_grad()
    def _in_place(self) -> Iterator[None]:
        """The model's own weights are put aside and come back bit by bit."""
        parameters = dict(self._model.named_parameters())
        here = [parameters[name].data for name in self._averages]
        there = list(self._averages.values())
        if self._averages_buffers:
            buffers = self._model_buffers()
            here += [buffers[name] for name in self._buffers]
            there += list(self._buffers.values())
        own = [tensor.clone() for tensor in here]
        try:
            torch._foreach_copy_(here, there)
            yield
        finally:
            torch._foreach_copy_(here, own)


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Neighbours of together about `CHUNK_BYTES`."""
    first = size = 0
    for index, tensor in enumerate(tensors):
        size += tensor.numel() * tensor.element_size()
        if size >= CHUNK_BYTES or index == len(tensors) - 1:
            yield slice(first, index + 1)
            first, size = index + 1, 0
