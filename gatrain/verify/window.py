"""One window of one recipe on one device, computed at once and in pieces, in any precision."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatrain import build
from gatrain.config import RunConfig
from gatrain.errors import DataError
from gatrain.tasks.base import (
    Batch,
    LossSum,
    Task,
    loss_sum_at,
    named_loss_sums,
    phase_loss_sum,
    phases_of,
    terms_of,
    weights_of,
)
from gatrain.train import samples, seeding
from gatrain.train.accumulate import gradient_step
from gatrain.train.batches import map_tensors, move_to
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.dropout import RandomNumbers
from gatrain.train.dropout.places import places_of
from gatrain.train.frozen import frozen_randomness
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.main_gradients import MasterWeights
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.offload import forward_context
from gatrain.train.phased_optimizer import frozen_but, groupings
from gatrain.train.precision import autocast_for
from gatrain.train.ranks import Ranks
from gatrain.verify.mutations import SixteenBitSums
from gatrain.verify.paths import Path

FIRST_SCALE = 2.0**16
"""Loss scale of fp16, halved until the gradient is finite."""

T = TypeVar("T")


class VerifiedWindow:
    """What `gatrain verify` computes.

    Args:
        config: of the run.
        checkpointing: as it trains.
    """

    def __init__(self, config: RunConfig, device: torch.device, ranks: Ranks, *, checkpointing: str) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.task: Task = build.build_task(config)
        self.strategy = build.build_strategy(config)
        self.norm = build.build_norm(config)
        self.phase = ""
        """Of a task with phases, the one that is computed; '' computes all of them at once."""
        self.adds_gradients = (
            self.strategy.needs_sum_over_samples
            and not self.strategy.normalises_window
            and not self.strategy.changes_gradient
        )
        """Whether the window's gradient is the sum of what each micro-batch alone has."""
        self.buffers = torch.zeros(0)
        """The model's floating-point buffers after the window that was computed last, in one vector."""
        self.shorten = False
        self._checkpointing = checkpointing
        # of a batch with stages, the largest
        effective = None if config.batch.counts_tokens else config.batch.largest
        schedule = build.window_schedule(config, self.task, effective)
        self.full_window = len(schedule.window(0).ids)
        self.ids: list[int] = schedule.window(0).ids.tolist()
        # read once: every case must see the same random augmentation
        self.samples_read: dict[int, Any] = {}
        self._whole: Batch | None = None
        self._weights: list[Tensor] = []
        self.holds_still = False  # torch draws random numbers in the forward, and they are held still
        self.random_numbers: weakref.WeakKeyDictionary[nn.Module, RandomNumbers] = weakref.WeakKeyDictionary()
        self._seed = config.train.seed, seeding.MICRO_STEP, 0
        self.cuts = False  # collate draws: pieces are cut from the whole batch

    # --- samples ---------------------------------------------------------------------------------------

    def keep(self, ids: list[int]) -> None:
        """Compute with these samples from now on, but for those that are skipped as unreadable."""
        self.ids, self._whole = self.readable(ids, len(ids)), None

    def readable(self, ids: Sequence[int], count: int) -> list[int]:
        """Without those of the first ``count`` that are skipped, and with all others.

        Raises:
            DataError: none is left.
        """
        skipped = {sample for sample in ids[:count] if isinstance(self.read(sample), samples.Skipped)}
        found = [sample for sample in ids if sample not in skipped]
        if not found:
            raise DataError("no sample of the first window can be read.")
        return found

    def read(self, sample: int) -> Any:
        if sample not in self.samples_read:
            seed = self.config.train.seed
            (self.samples_read[sample],) = samples.read(self.task, self.task.train_data, [(0, sample)], seed)
        return self.samples_read[sample]

    def host(self, ids: Sequence[int]) -> Batch:
        """A batch of these samples on the host."""
        batch = self.collated(ids)
        return self.task.shortened(batch) if self.shorten else batch

    def collated(self, ids: Sequence[int]) -> Batch:
        keys = [(0, sample) for sample in ids]
        read = [self.read(sample) for sample in ids]
        return samples.make(self.task, read, keys, self.config.train.seed).batch

    def whole(self) -> Batch:
        """The whole window in one batch on the host."""
        if self._whole is None:
            self._whole = self.collated(self.ids)
        return self.task.shortened(self._whole) if self.shorten else self._whole

    def pieces(self, splits: Sequence[Sequence[int]]) -> list[list[MicroBatch]]:
        """The window's micro-batches of every rank."""
        sizes = [size for rank in splits for size in rank]
        cut = None
        if self.cuts:
            self.whole()
            cut = samples.split_batch(self._whole, sizes, len(self.ids))
        found, first, nth = [], 0, 0
        for rank in splits:
            made = []
            for size in rank:
                batch = self.collated(self.ids[first : first + size]) if cut is None else cut[nth]
                first, nth = first + size, nth + 1
                if batch is None:
                    continue
                host = self.task.shortened(batch) if self.shorten else batch
                weights = weights_of(self.task, host)
                if self.phase:
                    weights = {name: weights[name] for name in self.terms() if name in weights}
                made.append(MicroBatch(host, weights, samples=size, position=first - size))
            found.append(made)
        return found

    def on_device(self, host: Batch, path: Path) -> Batch:
        """A batch on the device, its numbers in the path's precision."""
        moved, dtype = move_to(host, self.device), path.dtype
        if dtype is None:
            return moved
        return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, moved)

    def terms(self) -> Sequence[str]:
        """Names of the loss terms of the phase in hand, or of all."""
        return phases_of(self.task)[self.phase] if self.phase else terms_of(self.task)

    @property
    def has_own_strategy(self) -> bool:
        """Whether the gradient is computed by a class of the user's."""
        return not self.phase and not type(self.strategy).__module__.startswith("gatrain.")

    def _strategy(self) -> GradientStrategy:
        return Plain() if self.phase else self.strategy  # one phase is accumulated plainly

    # --- gradients -------------------------------------------------------------------------------------

    def model(self, path: Path) -> nn.Module:
        """The recipe's model as the path wants it, in training mode, always with the same weights."""
        model = build.build_model(self.task, self.config.train.seed, self.device, norm=self.norm)
        # frozen and trained as in the run, thawed later included
        grouped = groupings(self.task, self.config.optimizer, model)
        for parameter in frozen_but(self.phase, grouped) if self.phase else ():
            parameter.requires_grad_(False)
        tensors = [*model.parameters(), *model.buffers()]
        if not self._weights:
            self.ranks.broadcast_from_first(tensor.data for tensor in model.parameters())
            self._weights = [tensor.detach().clone() for tensor in tensors]
        elif len(tensors) == len(self._weights):
            for tensor, saved in zip(tensors, self._weights, strict=True):
                if tensor.shape == saved.shape:
                    tensor.data.copy_(saved)
        if path.dtype is not None:
            model = model.to(path.dtype)
        self.random_numbers[model] = build.build_random(self.config)
        self.random_numbers[model].set_up(model)
        if self._checkpointing != "auto":
            apply_checkpointing(model, self._checkpointing)
        return model

    @contextlib.contextmanager
    def computing(self, path: Path, model: nn.Module) -> Iterator[None]:
        """Everything in the path's precision, without random numbers."""
        before = torch.get_default_dtype()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._loss_modules(path.dtype))
            stack.enter_context(seeding.kept_random_state())
            if path.dtype is not None:
                torch.set_default_dtype(path.dtype)  # what the forward makes itself, such as a state of zeros
                stack.callback(torch.set_default_dtype, before)
                stack.enter_context(_one_algorithm())
            if self.holds_still:
                stack.enter_context(frozen_randomness(model))
            yield

    def loss_terms(
        self, model: nn.Module, on_device: Batch, places: Sequence[int] | None = None
    ) -> dict[str, LossSum]:
        """``places``: of the samples in the window, which key their dropout; None where any keys serve."""
        self.random_numbers[model].start(self._seed, places)
        return self._terms_as_seeded(model, on_device)

    def _terms_as_seeded(self, model: nn.Module, on_device: Batch) -> dict[str, LossSum]:
        seeding.seed_everything(self.config.train.seed)  # whole and pieces draw alike
        with self.random_numbers[model].around(contextlib.nullcontext)():
            if self.phase:
                return phase_loss_sum(self.task, partial(self.task.loss_sum, model), on_device, self.phase)
            return named_loss_sums(loss_sum_at(self.task, model, on_device, 0))

    def one_shot_backward(
        self,
        model: nn.Module,
        whole: Batch,
        path: Path,
        factor: float = 1.0,
        places: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Forward and backward over everything at once, with none of the training core."""
        model.zero_grad(set_to_none=True)
        with autocast_for(path.autocast, self.device)():
            terms = self.loss_terms(model, whole, places)
        means = [total / weight for total, weight in terms.values() if float(weight)]
        if means:
            (torch.stack(means).sum() * factor).backward()  # type: ignore[no-untyped-call]
        return {name: float(total.detach()) for name, (total, _) in terms.items()}

    def one_shot(self, path: Path) -> tuple[Tensor, dict[str, float]]:
        """Gradient and loss sums of the whole window in one batch."""
        model = self.model(path)
        with self.computing(path, model):
            batch = self.on_device(self.whole(), path)

            def compute(factor: float) -> tuple[Tensor, dict[str, float]]:
                sums = self.one_shot_backward(model, batch, path, factor, range(len(self.ids)))
                self.buffers = _numbers_of(model)
                return _flat(model.parameters()), sums

            return _scaled(path, compute)

    def split(
        self,
        path: Path,
        splits: Sequence[Sequence[int]],
        strategy: GradientStrategy | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Gradient and loss sums of this rank's part of ``splits`` (and the others') through the training core."""
        micro_batches = self.pieces(splits)[self.ranks.rank]
        model = self.model(path)
        masters = None if isinstance(strategy, SixteenBitSums) else MasterWeights(model)

        def compute(factor: float) -> tuple[Tensor, dict[str, float]]:
            parameters = masters.trained if masters is not None else list(model.parameters())
            for parameter in (*parameters, *model.parameters()):
                parameter.grad = None

            def loss_sums(on_device: Batch) -> dict[str, LossSum]:
                return {
                    name: (total * factor if factor != 1.0 else total, weight)
                    for name, (total, weight) in self._terms_as_seeded(model, on_device).items()
                }

            step = gradient_step(
                model,
                loss_sums,
                term_names=self.terms(),
                ranks=self.ranks,
                sync="overlap" if self.config.sync == "overlap" else "window",
                stage=lambda host: lambda: self.on_device(host, path),
                autocast=forward_context(
                    self._checkpointing, model, autocast_for(path.autocast, self.device)
                ),
                main_gradients=masters,
                strategy=strategy or self._strategy(),
                task=self.task,
                random=self.random_numbers[model],
            )
            result, _ = step.gradient(LoadedWindow(micro_batches, seed=self._seed))
            self.buffers = _numbers_of(model)
            sums = {name: float(value) / factor for name, value in result.local_loss_sums.items()}
            return _flat(parameters), sums

        with self.computing(path, model):
            return _scaled(path, compute)

    def micro_sum(self, path: Path, splits: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
        """Sum of the micro-gradients of every rank, each computed alone and added in fp64, and their spread
        (`gatrain.verify.limits.trained_limit`). With none of the training core. Collective."""
        pieces = self.pieces(splits)
        totals: dict[str, float] = {}
        for micro_batch in (each for rank in pieces for each in rank):
            for name, weight in micro_batch.weights.items():
                totals[name] = totals.get(name, 0.0) + float(weight)
        model = self.model(path)

        def compute(factor: float) -> tuple[Tensor, float]:
            total, squares = torch.zeros_like(_flat(model.parameters()), dtype=torch.float64), 0.0
            for micro_batch in pieces[self.ranks.rank]:
                model.zero_grad(set_to_none=True)
                with autocast_for(path.autocast, self.device)():
                    terms = self.loss_terms(
                        model, self.on_device(micro_batch.batch, path), places_of(micro_batch)
                    )
                parts = [part * (factor / totals[name]) for name, (part, _) in terms.items() if totals[name]]
                torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
                gradient = _flat(model.parameters()).double()
                total += gradient
                squares += float(gradient.norm()) ** 2
            if self.ranks.world_size > 1:
                dist.all_reduce(total)
            (squares,) = self.ranks.sum([squares])
            return total, math.sqrt(squares) / max(float(total.norm()), 1e-300)

        with self.computing(path, model):
            return _scaled(path, compute)

    @contextlib.contextmanager
    def _loss_modules(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Losses may hold tensors (class weights): move and convert the task's modules with the model."""
        owners = [self.task, *(v for v in vars(self.task).values() if hasattr(v, "__dict__"))]
        modules = [
            (owner, name, value)
            for owner in owners
            for name, value in vars(owner).items()
            if isinstance(value, nn.Module)
        ]
        for owner, name, module in modules:
            setattr(owner, name, copy.deepcopy(module).to(self.device, dtype))
        try:
            yield
        finally:
            for owner, name, module in modules:
                setattr(owner, name, module)


def _scaled(path: Path, compute: Callable[[float], tuple[Tensor, T]]) -> tuple[Tensor, T]:
    """Where fp16 trains, the loss is multiplied by a scale that is halved until the gradient is finite."""
    if path.name != "fp16" or not path.trains:
        return compute(1.0)
    scale = FIRST_SCALE
    while True:
        gradient, found = compute(scale)
        if bool(gradient.isfinite().all()) or scale <= 2.0**-14:
            return gradient.double() / scale, found
        scale /= 2


@contextlib.contextmanager
def _one_algorithm() -> Iterator[None]:
    """On a CPU, compute each sample alike whatever its batch.

    oneDNN chooses another convolution for another batch size, and a deep net at its start multiplies that
    rounding; here only the order of the sums may differ.
    """
    flags = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings():  # of hardware that is not here, at each change
        warnings.simplefilter("ignore")
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def _numbers_of(model: nn.Module) -> Tensor:
    found = [buffer.detach().double().flatten() for buffer in model.buffers() if buffer.is_floating_point()]
    return torch.cat(found) if found else torch.zeros(0)


def _flat(parameters: Any) -> Tensor:
    """All gradients in one vector; zeros where a parameter has none."""
    flat = []
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            flat.append((gradient.to_dense() if gradient.is_sparse else gradient).detach().flatten())
    return torch.cat(flat)
