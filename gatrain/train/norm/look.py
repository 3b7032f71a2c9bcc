"""One forward before the first window: which BatchNorm layers a model computes, and what its forward keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.norm.buffers import KeptBuffers
from gatrain.train.norm.calls import BatchNormCalls, Call, Site
from gatrain.train.norm.over_window import ORDER
from gatrain.train.norm.window_statistics import Normalise, statistics_dtype
from gatrain.train.seeding import host_random_state, same_host_random_state
from gatrain.train.step import Step


@dataclasses.dataclass(frozen=True)
class Look:
    """The same on every rank."""

    sites: tuple[Site, ...]
    """In the order of the forward."""
    sample_bytes: float
    """What a sample's forward keeps for its backward; for a whole micro-batch where nobody counted samples."""
    attributes: tuple[tuple[str, str], ...]
    """Names of modules and of their attributes that a forward sets."""
    grown: str = ""
    """A list or the like of a module that a forward adds tensors to, by its name."""
    draws_on_host: bool = False
    """Whether the forward draws from Python's or numpy's generator."""

    def window_bytes(self, window: LoadedWindow) -> float:
        """What this rank's forwards keep, all together."""
        return self.sample_bytes * _units(window, slice(None))


def look(
    window: LoadedWindow, step: Step, buffers: KeptBuffers, names: dict[int, str], *, with_graph: bool
) -> Look:
    """Look at one forward of a rank's first micro-batch. Collective; some rank has one.

    Args:
        with_graph: also at what is kept for the backward.

    Raises:
        ExactnessError: the ranks compute other layers.
    """
    own = _own_look(window, step, buffers, names, with_graph) if window.micro_batches else None
    every = [each for each in step.parallel.gather_values(own) if each is not None]
    if any(each.sites != every[0].sites for each in every):
        raise ExactnessError(ORDER)
    return dataclasses.replace(
        every[0],
        sample_bytes=max(each.sample_bytes for each in every),
        attributes=tuple(sorted({name for each in every for name in each.attributes})),
        grown=next((each.grown for each in every if each.grown), ""),
        draws_on_host=any(each.draws_on_host for each in every),
    )


def _own_look(
    window: LoadedWindow, step: Step, buffers: KeptBuffers, names: dict[int, str], with_graph: bool
) -> Look:
    seen: list[Site] = []

    def note(call: Call) -> Tensor:
        seen.append(call.site(names))
        dtype, channels = statistics_dtype(call.input), call.input.shape[1]
        mean, var = call.input.new_zeros(channels, dtype=dtype), call.input.new_ones(channels, dtype=dtype)
        normalised: Tensor = Normalise.apply(call.input, mean, var, call.weight, call.bias, call.eps)  # type: ignore[no-untyped-call]
        return normalised

    kept = _Kept(step.model)
    _, batch = next(step.batches(window))
    buffers.restore()
    step.seed(window, 0)
    numbers, before = host_random_state(), dict(_attributes(step.model))  # which holds what it names
    is_gpu = step.device.type == "cuda"
    allocated = torch.cuda.memory_allocated(step.device) if is_gpu else 0
    in_pass = step.parallel.micro_step(), step.autocast()
    with torch.set_grad_enabled(with_graph), kept.hooks(), BatchNormCalls(note), in_pass[0], in_pass[1]:
        terms = step.loss_sum(batch)
    taken = torch.cuda.memory_allocated(step.device) - allocated if is_gpu else 0
    del terms
    buffers.restore()
    found, grown = [], ""
    for name, (value, length) in _attributes(step.model):
        was, had = before.get(name, (_MISSING, None))
        if value is not was:
            found.append(name)
        elif length != had and _has_tensors(value):
            grown = grown or ".".join(filter(None, name))
    draws = not same_host_random_state(numbers, host_random_state())
    units = _units(window, slice(1))
    return Look(tuple(seen), max(kept.bytes, taken) / max(units, 1), tuple(found), grown, draws)


def _units(window: LoadedWindow, part: slice) -> float:
    """Samples of some micro-batches, or their number where not all are counted."""
    sizes = [micro.samples for micro in window.micro_batches]
    return sum(1 if None in sizes else size or 0 for size in sizes[part])


class _Kept:
    """Bytes that autograd keeps beside parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.bytes = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:  # what is kept is freed by nobody meanwhile
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return tensor


_OWN = {"_parameters", "_buffers", "_modules"}
_MISSING = object()


def _attributes(model: nn.Module) -> Iterator[tuple[tuple[str, str], tuple[Any, int | None]]]:
    """Names of module and attribute, with the value and how much a collection holds."""
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN:
                yield (
                    (module_name, name),
                    (value, len(value) if isinstance(value, list | dict | set) else None),
                )


def _has_tensors(collection: Any) -> bool:
    values = collection.values() if isinstance(collection, dict) else collection
    return any(isinstance(each, Tensor) for each in values)
