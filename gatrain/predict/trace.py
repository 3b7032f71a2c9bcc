"""The tracing process: ``python -m gatrain.predict.trace FOLDER``. Runs a recipe's real model, loss, backward and
optimizer step on tensors without data, and writes down every allocation.

Nothing here needs a GPU or much memory: `torch` computes shapes only (FakeTensorMode), whatever the model's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from gatrain import build
from gatrain.compose import load_config
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, GatrainError
from gatrain.predict import overheads, request
from gatrain.predict.emulate import emulate_cuda
from gatrain.predict.fused import fused_backend
from gatrain.predict.recorder import Recorder
from gatrain.predict.request import ModeTrace, Piece, TraceRequest, TraceResult
from gatrain.predict.timeline import (
    ACCUMULATING,
    FORWARD_BACKWARD,
    REDUCE,
    UPDATE,
    Events,
    LinearStep,
    Recording,
    same_events,
)
from gatrain.rundir import read_json, write_json
from gatrain.tasks.base import Batch, Task, named_weights
from gatrain.train.accumulate import PlainAccumulation
from gatrain.train.checkpointing import apply_checkpointing, available_modes
from gatrain.train.optimizer import build_optimizer
from gatrain.train.precision import autocast_for
from gatrain.train.ranks import Ranks, buckets_of, flatten

_CPU = torch.device("cpu")
ANCHORS = (2, 4)
"""Two sizes give a straight line. Size 1 is avoided: dimensions of 1 are copied and broadcast differently."""
PRIMES = (251, 241, 239, 233, 229, 227)
"""Sizes for a single trace: what a prime divides that divides no parameter's size grows with the batch."""
MAX_BISECTIONS = 8


class Batches:
    """Batches of any size without data, shaped as real worst-case ones are."""

    def __init__(self, task: Task) -> None:
        index = int(next(iter(task.worst_case_indices(1))))
        several = getattr(task.train_data, "__getitems__", None)
        sample = several([index])[0] if several else task.train_data[index]
        self._two, three = task.collate([sample] * 2), task.collate([sample] * 3)
        self.term_names = list(named_weights(task.weight(self._two)))
        self._leaves, self._spec = pytree.tree_flatten(self._two)
        self._larger = pytree.tree_leaves(three)

    def fake(self, size: int) -> Batch:
        """A batch of ``size`` samples. Call it under FakeTensorMode."""
        leaves = [
            _of_size(two, three, size) if isinstance(two, Tensor) else two
            for two, three in zip(self._leaves, self._larger, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._spec)


def _of_size(two: Tensor, three: Tensor, size: int) -> Tensor:
    shape = [a + (b - a) * (size - 2) for a, b in zip(two.shape, three.shape, strict=True)]
    return torch.empty(shape, dtype=two.dtype)


class ModeTracer:
    """One way of computing a step (checkpointing, compile), traced at any micro-batch."""

    def __init__(
        self, task: Task, config: RunConfig, asked: TraceRequest, mode: str, batches: Batches
    ) -> None:
        self._batches = batches
        self._asked = asked
        self._recorder = Recorder(overheads.CONVOLUTION_WORKSPACE_BYTES)
        self._model = _model_without_memory(task)
        apply_checkpointing(self._model, mode)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = _fused(build_optimizer(config.optimizer, self._model))
        self._clip_norm = config.optimizer.clip_norm
        self._accumulation = PlainAccumulation(
            self._model,
            self._loss_function(task),
            term_names=batches.term_names,
            ranks=Ranks(),
            stage=lambda batch: lambda: batch,
            autocast=autocast_for(asked.precision, _CPU),
        )
        self._overlaps = asked.world_size > 1 and asked.sync == "overlap"
        self._buckets: list[Tensor] = []
        self.persistent = self._make_persistent()

    def _loss_function(self, task: Task) -> Callable[[Batch], Any]:
        def loss_sum(batch: Batch) -> Any:
            return task.loss_sum(self._model, batch)

        if not self._asked.compile:
            return loss_sum
        return torch.compile(loss_sum, backend=fused_backend(self._recorder), dynamic=False)

    def _make_persistent(self) -> list[int]:
        """Bytes of parameters, buffers, optimizer state and, for DDP, buckets: all that outlives a step."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        tensors = [*self._model.parameters(), *self._model.buffers()]
        state = pytree.tree_leaves([*self._optimizer.state.values()])
        tensors += [leaf for leaf in state if isinstance(leaf, Tensor)]
        if self._overlaps:
            self._buckets = [torch.zeros_like(parameter) for parameter in self._parameters]
            tensors += self._buckets
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return self._recorder.adopt(tensors)

    def record(self, micro_batch: int, *, quick: bool = False) -> Recording:
        """Trace two micro-steps, the reduction and the update; ``quick``: the first micro-step alone."""
        batch = self._batches.fake(micro_batch)
        scale = dict.fromkeys(self._batches.term_names, 1.0)
        if self._asked.compile:  # compile first: the compiler must not see the recorder
            self._accumulation.micro_step(batch, scale)
            self._optimizer.zero_grad(set_to_none=True)
        self._accumulation.take_sums()
        gc.collect()
        self._recorder.take()
        phases: dict[str, Events] = {}
        batch_bytes = sum(self._recorder.adopt(x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)))
        with self._recorder, _no_collection():
            self._accumulation.micro_step(batch, scale)
            phases[FORWARD_BACKWARD], work = self._recorder.take()
            if quick:
                self._optimizer.zero_grad(set_to_none=True)
                return Recording(micro_batch, _renumbered(phases), work, batch_bytes)
            self._accumulation.micro_step(batch, scale)
            phases[ACCUMULATING], _ = self._recorder.take()
            self._reduce()
            phases[REDUCE], _ = self._recorder.take()
            self._update()
            phases[UPDATE], _ = self._recorder.take()
        self._accumulation.take_sums()
        return Recording(micro_batch, _renumbered(phases), work, batch_bytes)

    def _reduce(self) -> None:
        """What the window's reduction does to memory; the messages themselves need none of the allocator's."""
        if self._overlaps:
            for parameter, bucket in zip(self._parameters, self._buckets, strict=True):
                parameter.grad = bucket
        elif self._asked.world_size > 1:
            flats = [flatten(bucket) for bucket in buckets_of(self._parameters)]
            del flats

    def _update(self) -> None:
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def trace_mode(tracer: ModeTracer, mode: str, asked: TraceRequest, hint: int | None) -> ModeTrace:
    """Trace a mode so that every micro-batch up to the largest of use can be replayed.

    Args:
        hint: where another mode of the same model started to do other things.
    """
    began = time.perf_counter()
    if asked.compile:
        prime = next(p for p in PRIMES if all(size % p for size in tracer.persistent))
        piece = Piece(1, tracer.record(prime), None)
        return ModeTrace(mode, tracer.persistent, [piece], None, time.perf_counter() - began)
    low, high = (tracer.record(size) for size in ANCHORS)
    pieces = [Piece(1, low, high)]
    step = LinearStep(low, high)
    largest = asked.largest_of_use(step, tracer.persistent)
    straightness = None
    if largest > max(ANCHORS):
        check = tracer.record(largest)
        if same_events(low, check):
            straightness = _difference(step, check, tracer.persistent)
        else:
            switch = _switch(tracer, low, largest, hint)
            at_switch = tracer.record(switch)
            far = check if switch < largest and same_events(at_switch, check) else tracer.record(switch + 1)
            pieces.append(Piece(switch, at_switch, far))
    return ModeTrace(mode, tracer.persistent, pieces, straightness, time.perf_counter() - began)


def _difference(step: LinearStep, check: Recording, persistent: list[int]) -> float:
    """How far the line is from a trace at the same size, relative to the trace."""
    size = check.micro_batch
    level = LinearStep(check, dataclasses.replace(check, micro_batch=size + 1))  # a line without slope
    traced = level.peak(size, persistent, accumulates=True).reserved
    return abs(step.peak(size, persistent, accumulates=True).reserved / traced - 1)


def _switch(tracer: ModeTracer, low: Recording, largest: int, hint: int | None) -> int:
    """The smallest size at which the model does other things than at the small sizes, by bisection."""

    def differs(size: int) -> bool:
        return not same_events(low, tracer.record(size, quick=True), (FORWARD_BACKWARD,))

    if hint is not None and hint <= largest:
        return hint  # recomputing a block changes nothing of where the rest of the model switches
    below, above = max(ANCHORS), largest
    for _ in range(MAX_BISECTIONS):
        if above - below <= 1:
            break
        middle = (below + above) // 2
        below, above = (below, middle) if differs(middle) else (middle, above)
    return above


def _renumbered(phases: dict[str, Events]) -> dict[str, Events]:
    """Numbers from 0 in order of appearance, so that two recordings can be compared."""
    numbers: dict[int, int] = {}
    return {
        name: [(numbers.setdefault(number, len(numbers)), size) for number, size in events]
        for name, events in phases.items()
    }


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As on a GPU: one kernel for all parameters, without temporary copies."""
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def _model_without_memory(task: Task) -> nn.Module:
    """The model with fake parameters. Where building it needs numbers, it is built for real and emptied."""
    try:
        return task.build_model()
    except Exception:  # if the reason is another one, the second attempt says it
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        with torch.utils._python_dispatch._disable_current_modes():
            model = task.build_model()
        known: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = known.setdefault(id(parameter), nn.Parameter(mode.from_tensor(parameter.data)))
                    fake.requires_grad_(parameter.requires_grad)
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        return model


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Frees happen where reference counts say, not where the collector happens to run."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def trace_all(config: RunConfig, requests: Sequence[TraceRequest]) -> list[TraceResult]:
    """Trace every way of computing that the requests name and the model offers."""
    build.check_targets(config)
    task = build.build_task(config)
    batches = Batches(task)
    emulate_cuda()
    gc.freeze()  # what is loaded by now is not looked at again by each collection
    return [_trace(task, batches, config, asked) for asked in requests]


def _trace(task: Task, batches: Batches, config: RunConfig, asked: TraceRequest) -> TraceResult:
    traces: list[ModeTrace] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model_without_memory(task)
        offered = available_modes(model)
        parameters = [p.numel() for p in model.parameters()]
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        if not gradients:
            raise ConfigError(f"the model {type(model).__name__} has no parameter to train.")
        for mode in [mode for mode in asked.modes if mode in offered]:
            hint = next((trace.pieces[1].start for trace in traces if len(trace.pieces) > 1), None)
            traces.append(trace_mode(ModeTracer(task, config, asked, mode, batches), mode, asked, hint))
            torch._dynamo.reset() if asked.compile else None
    return TraceResult(sum(parameters), gradients, list(offered), traces)


def _main(folder: Path) -> None:
    result: dict[str, Any]
    try:
        config = load_config(folder / request.CONFIG)
        asked = [TraceRequest(**each) for each in read_json(folder / request.REQUEST)["requests"]]
        result = {"results": [found.to_dict() for found in trace_all(config, asked)]}
    except GatrainError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:
        if os.environ.get("GATRAIN_DEBUG"):
            raise
        text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        result = {
            "error": f"the model cannot be traced without data: {text} Models whose shapes depend on values "
            "(.item(), masks that select) need a real trial: gatrain autotune, on a machine with the GPU.",
            "exit_code": GatrainError.exit_code,
        }
    write_json(folder / request.RESULT, result)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here may touch a GPU
    _main(Path(sys.argv[1]))
