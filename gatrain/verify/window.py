"""One window of one recipe on one device, computed at once and in pieces, in any precision."""

from __future__ import annotations

import contextlib
import copy
import math
import time
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
from gatrain.errors import DataError, GatrainError
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
from gatrain.train.batches import map_tensors, move_to, tensors_of
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.dropout import RandomNumbers
from gatrain.train.dropout.notice import NoticeDraws
from gatrain.train.dropout.places import places_of
from gatrain.train.frozen import frozen_randomness
from gatrain.train.gradient import GradientStrategy
from gatrain.train.gradient.plain import Plain
from gatrain.train.held_state import HeldState, perturb
from gatrain.train.main_gradients import MasterWeights, half_names, half_parameters
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.offload import forward_context
from gatrain.train.phased_optimizer import frozen_but, groupings
from gatrain.train.precision import autocast_for
from gatrain.train.ranks import Ranks
from gatrain.verify.limits import coarsest
from gatrain.verify.mutations import SixteenBitSums
from gatrain.verify.paths import FP32, FP64, NoticeCasts, Path, trained_path

PASSES = 9
"""Passes over the window in one precision, over all cases and processes."""
REPEATS = 3
"""Forwards that must agree, for the model to be called free of random numbers of its own."""
LEAST_SAMPLES, SLOW_SAMPLE_S = 8, 1.0
LOOKED_AT = 4
"""Samples at the start of the window that the first looks need."""
FIRST_SCALE = 2.0**16
"""Loss scale of fp16, halved until the gradient is finite."""

T = TypeVar("T")


class Verification:
    """What `gatrain verify` computes with.

    Args:
        config: of the run.
        precision: as it trains.
        checkpointing: as it trains.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, ranks: Ranks, *, precision: str, checkpointing: str
    ) -> None:
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
        self.notes: list[str] = []
        self.shorten = False
        self.paths: list[Path] = []
        """Those that the model computes in."""
        self.trained: Path | None = None
        self.casts = "fp64"
        """The coarsest precision that the model computes in by itself, whatever its parameters are."""
        self.half_dtypes = ""
        """Of trained 16-bit parameters: ``bf16``, say."""
        self.remembers: str | None = None
        """What the loss depends on besides parameters and samples."""
        self.causes: list[str] = []
        """What is known to make the result depend on the split."""
        self._precision = precision
        self._checkpointing = checkpointing
        # of a batch with stages, the largest
        effective = None if config.batch.counts_tokens else config.batch.largest
        schedule = build.window_schedule(config, self.task, effective)
        self.full_window = len(schedule.window(0).ids)
        self.ids: list[int] = schedule.window(0).ids.tolist()
        # read once: every case must see the same random augmentation
        self._samples: dict[int, Any] = {}
        self._whole: Batch | None = None
        self._weights: list[Tensor] = []
        self._draws = False  # torch draws random numbers in the forward, and they are held still
        self._random: weakref.WeakKeyDictionary[nn.Module, RandomNumbers] = weakref.WeakKeyDictionary()
        self._seed = config.train.seed, seeding.MICRO_STEP, 0
        self._cuts = False  # collate draws: pieces are cut from the whole batch

    # --- what the model and the data do ---------------------------------------------------------------

    def inspect(self) -> None:
        """Find the precisions that the model computes in, what draws random numbers, and what cannot be exact.

        Raises:
            Exception: the user's code fails in every precision.
        """
        model = self.model(Path("", None))
        while (found := self._readable(self.ids, LOOKED_AT)) != self.ids:
            self.ids = found
        self.trained = trained_path(model, self._precision)
        self._look_at_collate()
        # as it trains, or in fp32 where that does not compute here
        for path, looked_at in ((Path("", None, self._precision), model), (FP32, None)):
            try:
                self._look_at_state(path, looked_at or self.model(path))
                self._look_at_randomness(path, looked_at or self.model(path))
                break
            except GatrainError:
                raise
            except Exception:  # which the paths will say
                continue
        failures: list[tuple[str, Exception]] = []
        for path in filter(None, (FP64, FP32, self.trained)):
            try:
                self._try(path)
                self.paths.append(path)
            except GatrainError:
                raise
            except Exception as error:
                failures.append((path.name, error))
        if not self.paths:
            raise failures[-1][1]
        for name, failure in failures:
            text = str(failure).strip().split("\n")[0][:150]
            self.notes.append(
                f"The model does not compute in {name} here ({type(failure).__name__}: {text}): nothing is judged "
                f"in {name}."
            )
        if self.trained not in self.paths:
            self.trained = None
        self._say_what_is_known(model)

    def _try(self, path: Path) -> None:
        """Two samples forward and backward in this precision."""
        model = self.model(path)
        with self.computing(path, model):
            probe = self.on_device(self.host(self.ids[:2]), path)
            if path == FP64:
                with NoticeCasts() as casts, torch.no_grad():  # type: ignore[no-untyped-call]
                    self._terms(model, probe)
                self.casts = coarsest("fp64", *casts.seen)
            self._one_shot_backward(model, probe, path)

    def _look_at_randomness(self, path: Path, model: nn.Module) -> None:
        """Whether the forward draws random numbers, and whether they can be held still."""
        drew: set[str] = set()
        host = self.host(self.ids[:2])
        is_keyed = self._random[model].is_keyed

        def losses(freeze: bool) -> list[float]:
            self._draws = freeze
            with self.computing(path, model), torch.no_grad(), autocast_for(path.autocast, self.device)():
                probe = self.on_device(host, path)
                found = [float(total) for total, _ in self._terms(model, probe).values()]
                if not freeze:
                    drew.update(_drawn(self.device, self.config.train.seed))
                return found

        # the same seed again: what draws from a generator of its own shows in the losses
        try:
            plain = [losses(False) for _ in range(REPEATS)]
            held_still = "torch" in drew and not is_keyed
            frozen = [losses(True) for _ in range(REPEATS)] if held_still else plain
            if is_keyed:
                self._look_beside_keys(path, model, host, "torch" in drew)
        finally:
            self._draws = False
        self._draws = held_still
        if self._draws:
            self.notes.append(
                "Dropout draws another mask for each split, so it is off in this check, as is every other random "
                "number of torch: with them, splits are equal in distribution, not in value."
            )
        if drew - {"torch"}:
            self.notes.append(
                "The forward draws from random or numpy: here every forward starts from the same seed, so that "
                "whole and pieces draw the same."
            )
        if frozen.count(frozen[0]) != REPEATS and self.remembers is None:
            text = (
                "the model or loss draws random numbers that gatrain does not control (a generator of its own, "
                "time, os.urandom): it gives another loss for the same samples"
            )
            self.causes.append(text)
            self.notes.append(f"{text[0].upper()}{text[1:]}, so a difference is no proof of a wrong split.")

    def _look_beside_keys(self, path: Path, model: nn.Module, host: Batch, draws: bool) -> None:
        """What dropout=keyed does not reach."""
        self.notes.append("Dropout is on in this check: its masks are keyed by sample.")
        if not draws:
            return
        with (
            self.computing(path, model),
            torch.no_grad(),
            autocast_for(path.autocast, self.device)(),
            NoticeDraws(model) as notice,
        ):
            self._terms(model, self.on_device(host, path))
        text = f"the forward draws random numbers that dropout=keyed does not reach ({notice.words})"
        self.causes.append(text)
        self.notes.append(f"{text[0].upper()}{text[1:]}: they are other ones in each split.")

    def _look_at_state(self, path: Path, model: nn.Module) -> None:
        """Whether the loss remembers earlier micro-steps (a counter, a moving average): so it depends on their
        number."""
        probe = self.on_device(self.host(self.ids[:2]), path)

        def losses() -> list[float]:
            with autocast_for(
                path.autocast, self.device
            )():  # with a graph: some code moves its state only then
                return [float(total.detach()) for total, _ in self._terms(model, probe).values()]

        start = HeldState(model, self.task)
        try:
            with self.computing(path, model):
                losses()  # the first call may make things
                before = HeldState(model, self.task)
                first, changed = losses(), before.changed()
                later = losses()
                before.restore()
                repeats = losses() == first
                if repeats and changed and later == first:
                    before.restore()
                    perturb(changed)
                    with contextlib.suppress(Exception):  # such as an index out of range
                        later = losses()
                before.restore()
        finally:
            start.restore()
        if changed and repeats and later != first:
            names = ", ".join(slot.name for slot in changed[:3]) + (", ..." if len(changed) > 3 else "")
            self.remembers = (
                f"the loss depends on what earlier micro-steps left behind ({names}), so on their number: a moving "
                "average, a counter or a queue has to move once for each optimizer step, not in the forward."
            )

    def _look_at_collate(self) -> None:
        """Whether the same samples make the same batch; otherwise pieces are cut from the whole one."""
        ids = self.ids[: min(4, len(self.ids))]
        self._collated(ids)  # reads them
        first, drew = samples.draws_random_numbers(lambda: self._collated(ids))
        differs = not _equal(first, self._collated(ids))
        read, self._samples = self._samples, {}
        again = self._collated(ids)
        self._samples = read
        if differs or not _equal(first, again):
            self.notes.append(
                "The data gives another batch for the same samples each time: it draws random numbers that gatrain "
                "cannot seed (a generator of its own, time, os.urandom). The splits below compute the same "
                "numbers, but no run can be repeated or resumed exactly."
            )
        if not (drew or differs):
            return
        self._cuts = samples.split_batch(first, [1] * len(ids), len(ids)) is not None
        what = "The collate function draws random numbers"
        if self._cuts:
            self.notes.append(
                f"{what}: the pieces are cut from the whole window's batch, so that they agree."
            )
            return
        self.causes.append(
            "the collate function draws random numbers, other ones for pieces than for the whole"
        )
        self.notes.append(
            f"{what}, and its batch cannot be cut into samples: whole and pieces hold other numbers, so a "
            "difference is no proof of a wrong split."
        )

    def _say_what_is_known(self, model: nn.Module) -> None:
        if norms := self.norm.mixing(model):
            more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            self.causes.insert(0, f"BatchNorm ({norms[0]}{more}) uses each micro-batch's own statistics")
            self.notes.append(
                f"BatchNorm normalises each micro-batch by its own statistics ({norms[0]}{more}): with it, the "
                "result depends on the split and cannot equal the whole batch. norm=exact, norm=group, norm=layer "
                "and norm=frozen are exact."
            )
        if self.casts != "fp64":
            self.notes.append(
                f"The model or its loss computes in {self.casts} by itself (.float() and the like), also where its "
                f"parameters are fp64: its gradient is judged by {self.casts} rounding."
            )
        if type(self.strategy) is not Plain:
            self.notes.append(f"What is exact: {str(self.strategy.exact).rstrip('.')}.")
        if self.trained is not None:
            self.half_dtypes = half_names(parameter.dtype for parameter in half_parameters(model))
            kinds = f"{self.half_dtypes} parameters, fp32 sums and master weights" if self.half_dtypes else ""
            cast = f"autocast {self._precision}" if self._precision != "fp32" else ""
            self.notes.append(f"The trained path: {', '.join(filter(None, (kinds, cast)))}.")

    # --- samples ---------------------------------------------------------------------------------------

    def choose_samples(self, seconds: float) -> None:
        """Keep as many samples of the window as ``seconds`` allow, at least a few."""
        path = self.paths[0]
        one_s = self._seconds_of_one_sample(path)
        if one_s > SLOW_SAMPLE_S:
            whole = _elements(self.host(self.ids[:1]))
            self.shorten = True
            if _elements(self.host(self.ids[:1])) < whole:
                self.notes.append(
                    "long samples were shortened for this check; the model is the recipe's own."
                )
                one_s = self._seconds_of_one_sample(path)
        one_s *= self.strategy.cost_of(self.model(path)).in_micro_steps
        affordable = int(seconds / ((0.5 + len(self.paths)) * PASSES * max(one_s, 1e-6)))
        # an even number: some code takes no other
        self.keep(self.ids[: min(len(self.ids), max(LEAST_SAMPLES, affordable - affordable % 2))])

    def keep(self, ids: list[int]) -> None:
        """Compute with these samples from now on, but for those that are skipped as unreadable."""
        self.ids, self._whole = self._readable(ids, len(ids)), None

    def _readable(self, ids: Sequence[int], count: int) -> list[int]:
        """Without those of the first ``count`` that are skipped, and with all others.

        Raises:
            DataError: none is left.
        """
        skipped = {sample for sample in ids[:count] if isinstance(self._read(sample), samples.Skipped)}
        found = [sample for sample in ids if sample not in skipped]
        if not found:
            raise DataError("no sample of the first window can be read.")
        return found

    def _read(self, sample: int) -> Any:
        if sample not in self._samples:
            seed = self.config.train.seed
            (self._samples[sample],) = samples.read(self.task, self.task.train_data, [(0, sample)], seed)
        return self._samples[sample]

    def _seconds_of_one_sample(self, path: Path) -> float:
        model, probe = self.model(path), self.ids[:2]  # not one: BatchNorm may refuse a single sample
        with self.computing(path, model):
            batch = self.on_device(self.host(probe), path)
            for _ in range(2):  # the first call also pays for warming up
                began = time.perf_counter()
                self._one_shot_backward(model, batch, path)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / len(probe)

    def host(self, ids: Sequence[int]) -> Batch:
        """A batch of these samples on the host."""
        batch = self._collated(ids)
        return self.task.shortened(batch) if self.shorten else batch

    def _collated(self, ids: Sequence[int]) -> Batch:
        keys = [(0, sample) for sample in ids]
        read = [self._read(sample) for sample in ids]
        return samples.make(self.task, read, keys, self.config.train.seed).batch

    def whole(self) -> Batch:
        """The whole window in one batch on the host."""
        if self._whole is None:
            self._whole = self._collated(self.ids)
        return self.task.shortened(self._whole) if self.shorten else self._whole

    def pieces(self, splits: Sequence[Sequence[int]]) -> list[list[MicroBatch]]:
        """The window's micro-batches of every rank."""
        sizes = [size for rank in splits for size in rank]
        cut = None
        if self._cuts:
            self.whole()
            cut = samples.split_batch(self._whole, sizes, len(self.ids))
        found, first, nth = [], 0, 0
        for rank in splits:
            made = []
            for size in rank:
                batch = self._collated(self.ids[first : first + size]) if cut is None else cut[nth]
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
        self._random[model] = build.build_random(self.config)
        self._random[model].set_up(model)
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
            if self._draws:
                stack.enter_context(frozen_randomness(model))
            yield

    def _terms(
        self, model: nn.Module, on_device: Batch, places: Sequence[int] | None = None
    ) -> dict[str, LossSum]:
        """``places``: of the samples in the window, which key their dropout; None where any keys serve."""
        self._random[model].start(self._seed, places)
        return self._terms_as_seeded(model, on_device)

    def _terms_as_seeded(self, model: nn.Module, on_device: Batch) -> dict[str, LossSum]:
        seeding.seed_everything(self.config.train.seed)  # whole and pieces draw alike
        with self._random[model].around(contextlib.nullcontext)():
            if self.phase:
                return phase_loss_sum(self.task, partial(self.task.loss_sum, model), on_device, self.phase)
            return named_loss_sums(loss_sum_at(self.task, model, on_device, 0))

    def _one_shot_backward(
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
            terms = self._terms(model, whole, places)
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
                sums = self._one_shot_backward(model, batch, path, factor, range(len(self.ids)))
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
                random=self._random[model],
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
                    terms = self._terms(
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


def _drawn(device: torch.device, seed: int) -> set[str]:
    """Which generators moved since they were seeded: ``torch``, or ``random`` and numpy, called ``host``."""

    def states() -> tuple[Any, Any, Tensor, Tensor]:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(1)
        return *seeding.random_state(), on_device

    now = states()
    seeding.seed_everything(seed)
    fresh = states()
    found = set()
    if not (torch.equal(now[2], fresh[2]) and torch.equal(now[3], fresh[3])):
        found.add("torch")
    if not seeding.same_random_state((now[0], now[1], fresh[2]), fresh[:3]):
        found.add("host")
    return found


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


def _equal(one: Batch, other: Batch) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _elements(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in tensors_of(batch))


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
