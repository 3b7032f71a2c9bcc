"""A recipe's real model, loss, backward and update on tensors without data, with every allocation written down."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from gatrain.build import build_hooks, build_random, build_strategy, optimizer_maker
from gatrain.config import RunConfig
from gatrain.construction import check_shapes, kept_defaults
from gatrain.predict.recorder import Recorder
from gatrain.predict.request import TraceRequest
from gatrain.predict.timeline import MICRO_STEP, REDUCE, UPDATE, WORKSPACE, Events, Held, Recording
from gatrain.tasks.base import Batch, Task, loss_sum_at, terms_of
from gatrain.train import samples
from gatrain.train.accumulate import gradient_step
from gatrain.train.batches import map_tensors, tensors_of
from gatrain.train.checkpointing import apply_checkpointing, blocks_of
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.norm import Normalisation
from gatrain.train.phased_optimizer import build_for, counted_for, groupings
from gatrain.train.precision import autocast_for
from gatrain.train.ranks import Ranks, buckets_of, flatten
from gatrain.train.seeding import MODEL, seeded
from gatrain.train.step import Step

_CPU = torch.device("cpu")


class Batches:
    """Batches of any size without data, shaped as real worst-case ones are."""

    def __init__(self, task: Task, seed: int = 0) -> None:
        key = (0, int(next(iter(task.worst_case_indices(1)))))
        sample = samples.read_one(task, task.train_data, key, seed)
        self._two, three = (samples.collated(task, [sample] * n, [key] * n, seed) for n in (2, 3))
        self._pairs = list(zip(tensors_of(self._two), tensors_of(three), strict=True))

    def fake(self, size: int) -> Batch:
        """A batch of ``size`` samples. Call it under FakeTensorMode."""
        pairs = iter(self._pairs)
        return map_tensors(lambda _: _of_size(*next(pairs), size), self._two)


def _of_size(two: Tensor, three: Tensor, size: int) -> Tensor:
    shape = [a + (b - a) * (size - 2) for a, b in zip(two.shape, three.shape, strict=True)]
    return torch.empty(shape, dtype=two.dtype)


class StepTracer:
    """One model's step, traced at any micro-batch, in one mode of checkpointing after the other (`in_mode`)."""

    def __init__(
        self, task: Task, model: nn.Module, config: RunConfig, asked: TraceRequest, batches: Batches
    ) -> None:
        self._task = task
        self._model = model
        self._config = config
        self._asked = asked
        self._batches = batches
        self._recorder = Recorder()
        grouped = groupings(task, config.optimizer, model)
        self._masters = MasterWeights(model)
        self._parameters = self._masters.trained
        self._optimizer = _fused(
            build_for(
                task,
                config.optimizer,
                grouped,
                self._masters.of,
                maker_of=optimizer_maker,
                try_first=False,
            ).optimizer
        )
        self._clip_norm = config.optimizer.clip_norm
        self._hooks = list(build_hooks(config).values())
        self._can_step = True
        """Without numbers; of an optimizer that looks at them only the state is predicted, not its temporaries."""
        self._count_state = partial(counted_for, grouped, (), optimizer_maker)
        self._step: Step
        self._strategy = build_strategy(config)
        for parameter in model.parameters():
            if parameter.requires_grad and self._strategy.holds_gradients:
                parameter.register_post_accumulate_grad_hook(self._mark_gradient)
        self._done: dict[int, Recording] = {}
        self.held = self._make_held()

    @contextlib.contextmanager
    def in_mode(self, mode: str) -> Iterator[None]:
        """Trace in a mode of checkpointing; the model is as before at the end."""
        before = [(block, block.__dict__.get("forward")) for block in blocks_of(self._model)]
        random = build_random(self._config)
        random.set_up(self._model)
        apply_checkpointing(self._model, mode)
        self._done = {}
        self._step = gradient_step(
            self._model,
            lambda batch: loss_sum_at(self._task, self._model, batch, 0),
            term_names=terms_of(self._task),
            ranks=Ranks(),
            stage=lambda batch: lambda: batch,
            autocast=autocast_for(self._asked.precision, _CPU),
            main_gradients=self._masters,
            strategy=self._strategy,
            task=self._task,
            random=random,
        )
        self._step.masters = self._masters
        self._strategy.set_up(self._step, self._optimizer)
        try:
            yield
        finally:
            for block, forward in before:
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.__dict__["forward"] = forward

    def _make_held(self) -> Held:
        """Bytes of parameters, buffers, optimizer state and hooks: all that outlives a step."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        counted: list[int] = []
        try:
            self._optimizer.step()
        except Exception:
            self._can_step = False
            self._optimizer.state.clear()
            with torch.utils._python_dispatch._disable_current_modes():
                counted = self._count_state()
        self._masters.copy_to_model()
        self._optimizer.zero_grad(set_to_none=True)
        tensors = [*self._model.parameters(), *self._model.buffers(), *self._parameters]
        model = self._recorder.adopt(tensors)
        state = pytree.tree_leaves([*self._optimizer.state.values()])
        optimizer = counted or self._recorder.adopt(leaf for leaf in state if isinstance(leaf, Tensor))
        gradients = [parameter.nbytes for parameter in self._parameters if self._strategy.holds_gradients]
        hooks = [size for hook in self._hooks if (size := hook.device_bytes(self._model))]
        return Held(model, [*optimizer, *hooks], gradients=gradients)

    def _mark_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._recorder.mark_gradient(self._masters.of(parameter))

    def record(self, micro_batch: int, *, quick: bool = False) -> Recording:
        """Trace a micro-step, the reduction and the update; ``quick``: the micro-step alone will do."""
        done = self._done.get(micro_batch)
        if done is None or not (quick or UPDATE in done.phases):
            done = self._done[micro_batch] = self._record(micro_batch, quick)
        return done

    def _record(self, micro_batch: int, quick: bool) -> Recording:
        batch = self._batches.fake(micro_batch)
        scale = dict.fromkeys(terms_of(self._task), 1.0)
        self._step.counts.take()
        gc.collect()
        self._recorder.take()
        self._recorder.micro_batch = micro_batch
        phases: dict[str, Events] = {}
        batch_bytes = sum(self._recorder.adopt(tensors_of(batch)))
        with self._recorder, _no_collection():
            self._strategy.micro_step(self._step, batch, scale)
            elements = self._recorder.largest_elements
            phases[MICRO_STEP], work = self._recorder.take()
            if not quick:
                self._reduce()
                phases[REDUCE], _ = self._recorder.take()
                self._update()
                phases[UPDATE], _ = self._recorder.take()
        self._optimizer.zero_grad(set_to_none=True)
        self._step.counts.take()
        return Recording(micro_batch, _renumbered(phases), work, batch_bytes, elements)

    def _reduce(self) -> None:
        """What the window's reduction does to memory; the messages themselves need none of the allocator's."""
        if self._asked.world_size > 1 and not self._strategy.holds_gradients:
            for bucket in buckets_of(self._parameters):
                torch.cat([parameter.detach().reshape(-1) for parameter in bucket])
        elif self._asked.world_size > 1:
            flats = [flatten(bucket) for bucket in buckets_of(self._parameters)]
            del flats

    def _update(self) -> None:
        self._masters.take_changes()
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        self._strategy.clip(
            self._step, lambda _: nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        )
        if self._can_step:
            self._optimizer.step()
        self._masters.copy_to_model()
        self._optimizer.zero_grad(set_to_none=True)


def _renumbered(phases: dict[str, Events]) -> dict[str, Events]:
    """Numbers from 0 in order of appearance, so that two recordings can be compared."""
    numbers: dict[int, int] = {}
    return {
        name: [
            (number if size == WORKSPACE else numbers.setdefault(number, len(numbers)), size)
            for number, size in events
        ]
        for name, events in phases.items()
    }


def _fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As on a GPU: one kernel for all parameters, without temporary copies."""
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def model_without_memory(task: Task, seed: int = 0, norm: Normalisation | None = None) -> nn.Module:
    """The model with fake parameters. Where building it needs numbers, it is built for real and emptied."""
    norm = norm or Normalisation()
    try:
        with kept_defaults(), _no_rejection():
            model = norm.convert(check_shapes(task.build_model()))
    except Exception:  # if the reason is another one, the second attempt says it
        with torch.utils._python_dispatch._disable_current_modes(), seeded(seed, MODEL):
            model = norm.convert(check_shapes(task.build_model()))
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(
                        mode.from_tensor(parameter.data), requires_grad=parameter.requires_grad
                    )
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                module._buffers[name] = mode.from_tensor(buffer)
    return model


@contextlib.contextmanager
def _no_rejection() -> Iterator[None]:
    """Weights drawn from a cut normal distribution are not looked at and drawn again: there are no numbers."""
    name = "_no_grad_trunc_normal_"  # the part of ``trunc_normal_`` that torch 2.14 let look at them
    original = getattr(nn.init, name, None)
    setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        if original is None:
            delattr(nn.init, name)
        else:
            setattr(nn.init, name, original)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Frees happen where reference counts say, not where the collector happens to run."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
