"""One micro-batch size, measured as training will run it: real batches, reduction and optimizer update.

Runs in a trial process. Every function marked *collective* is called by all ranks in the same order;
whatever can fail on one rank alone is guarded, and the ranks compare notes before anybody enters the next
collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from gatrain import units
from gatrain.causes import user_frames
from gatrain.errors import DoesNotFitError, GatrainError, is_out_of_memory
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, Measurement
from gatrain.rank import Rank
from gatrain.tasks.base import Batch
from gatrain.train.batches import bytes_of
from gatrain.train.meter import Meter
from gatrain.tune.curve import DIFFERS
from gatrain.tune.judging import disagrees
from gatrain.tune.trials.batches import TrialBatches
from gatrain.tune.trials.memory import Memory

if TYPE_CHECKING:
    from gatrain.train.engine import Engine

T = TypeVar("T")

TARGET_S = {"cpu": 0.5, "cuda": 0.4}
"""Seconds of timed micro-steps to aim at for one size; close calls are decided by full steps."""
REPEATS = {"cpu": (3, 60), "cuda": (4, 20)}
"""Fewest and most timed micro-steps; they are spread over `CYCLES` full steps."""
CYCLES = 2
MORE_CYCLES, MORE_S = 8, {"cpu": 1.5, "cuda": 1.0}
"""Further full steps of a size whose repeats differ by more than `gatrain.tune.curve.DIFFERS`, and the seconds
that they may take."""
GUESSES, CHEAP_S = 3, 0.05
"""Micro-steps behind the first guess of their time, where they are cheap: one alone may have waited for others."""
WARM_UPS = {"cpu": 0, "cuda": 2}
"""Micro-steps before the clock starts, besides the truth check, which warms up as well."""
TYPICAL: dict[str, Callable[[list[float]], float]] = {"cpu": min, "cuda": statistics.median}
"""How to read repeated times: a CPU is shared with others, who can only add; a GPU is this process's own."""
NOISE_SEEDS = 3
TYPICAL_BATCHES = 4
"""Batches of random samples that are timed where lengths vary."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank: an outcome of `gatrain.plan` and a text."""

    outcome: str
    text: str


class Peers:
    """Small talk between ranks on the host, through a gloo group of its own: it never touches a GPU."""

    def __init__(self, rank: Rank) -> None:
        self._size = rank.world_size
        self._group: Any = dist.new_group(backend="gloo") if self._size > 1 else None  # collective

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order. Collective."""
        if self._size == 1:
            return [value]
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def worst(self, failure: Failure | None) -> Failure | None:
        """The failure of any rank, a crash before one of memory; None if there is none. Collective."""
        failures = [each for each in self.gather(failure) if each is not None]
        return min(failures, key=lambda each: each.outcome != FAILED, default=None)


@dataclass
class Reference:
    """Loss per unit weight of the repeated sample at the first size of all, and its spread over random seeds.

    The weights never move and every engine starts from the same ones, so it holds for all ways of computing in one
    precision.
    """

    loss: float | None = None
    noise: float = 0.0


class SizeMeter:
    """Measures sizes one after the other in a warm process."""

    def __init__(
        self,
        engine: Engine,
        batches: TrialBatches,
        rank: Rank,
        peers: Peers,
        memory: Memory,
        reference: Reference,
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._memory = memory
        self._meter = Meter(rank.device)
        self._device = rank.device
        self._batches = batches
        self._reference = reference
        self._updates = 0

    def measure(self, size: int) -> Measurement:
        """Try one size. Collective; never raises for what a model, a batch or a memory limit may do.

        Raises:
            DoesNotFitError: memory ran out inside a reduction, where the other ranks cannot be told.
        """
        self._memory.reset_peak()
        try:
            return self._measure(size)
        finally:
            self._drop_gradients()
            self._memory.release()

    def _measure(self, size: int) -> Measurement:
        state: dict[str, Any] = {}

        def first_pass() -> None:
            same = self._on_device(self._batches.repeated(size))
            began = time.perf_counter()
            state["loss"], state["noise"] = self._loss_of_one_sample(same)
            state["repeated"] = self._repeated_loss(same, state["loss"])
            state["first_s"] = time.perf_counter() - began
            # memory is that of the worst batch; time is that of usual ones, where they differ
            worst = self._on_device(self._batches.worst_case(size))
            state["host_bytes"] = bytes_of(worst[0])
            self._passes(*worst)
            usual = self._batches.usual(size, TYPICAL_BATCHES)
            state["timed"] = [self._on_device(each) for each in usual] or [worst]
            for each in state["timed"]:
                for _ in range(WARM_UPS[self._device.type]):
                    self._passes(*each)
            state["micro_step_s"] = self._guess(state["timed"][0])
            state["host_s"] = self._host_seconds(state["timed"][0], state["micro_step_s"])

        failure = self._peers.worst(attempt(first_pass))
        if failure is None:
            failure = self._close_step()[0]  # makes the optimizer's state and the buckets, once for all sizes
        if failure is not None:
            return Measurement(size, failure.outcome, error=failure.text)
        slowest = max(self._peers.gather(state["micro_step_s"]))
        failure, times = self._cycles(state["timed"], slowest)
        if failure is None and len(state["timed"]) > 1:
            # once more, among the fragments that batches of other lengths have left
            worst = self._batches.worst_case(size)
            failure = self._peers.worst(attempt(lambda: self._engine.micro_step(*self._on_device(worst))))
        if failure is not None:
            return Measurement(size, failure.outcome, error=failure.text)
        found = self._summary(size, state["loss"], state["noise"], times)
        repeated = self._peers.gather((state["loss"], state["repeated"]))
        own = [again for loss, again in repeated if loss == found.loss]
        hosts = self._peers.gather(state["host_s"])
        return dataclasses.replace(
            found,
            repeated_loss=own[0] if own else None,
            compile_s=max(self._peers.gather(state["first_s"])),
            host_bytes=max(self._peers.gather(state["host_bytes"])),
            host_s=min((each for each in hosts if each is not None), default=None),
        )

    def _on_device(self, prepared: tuple[Batch, Mapping[str, float]]) -> tuple[Batch, Mapping[str, float]]:
        batch, weights = prepared
        return self._engine.to_device(batch), {name: 1 / w if w else 0.0 for name, w in weights.items()}

    def _passes(self, batch: Batch, scale: Mapping[str, float]) -> None:
        """What the gradient strategy computes for one micro-batch: a micro-step's time is that of all of it."""
        cost = self._engine.step.strategy.cost_of(self._engine.model)
        for _ in range(round(cost.forwards)):
            self._engine.forward_pass(batch)
        for _ in range(max(1, round(cost.micro_steps))):
            self._engine.micro_step(batch, scale)

    def _guess(self, prepared: tuple[Batch, Mapping[str, float]]) -> float:
        """Seconds of a micro-step, roughly."""
        found = self._timed(lambda: self._passes(*prepared))
        for _ in range(GUESSES - 1):
            if found < CHEAP_S:
                found = min(found, self._timed(lambda: self._passes(*prepared)))
        return found

    def _host_seconds(self, prepared: tuple[Batch, Mapping[str, float]], micro_step_s: float) -> float | None:
        """Seconds until a micro-step is handed to a GPU, which has nothing else to do; None where it takes so long
        that the GPU has enough to do."""
        if self._device.type != "cuda" or micro_step_s >= CHEAP_S:
            return None
        found = []
        for _ in range(GUESSES):
            self._timed(lambda: None)
            began = time.perf_counter()
            self._passes(*prepared)
            found.append(time.perf_counter() - began)
        return min(found)

    def _timed(self, call: Callable[[], object]) -> float:
        """Seconds of one call. Waits for the device."""
        start = self._meter.mark()
        call()
        return self._meter.seconds(start, self._meter.mark())

    def _loss_of_one_sample(self, same: tuple[Batch, Mapping[str, float]]) -> tuple[float | None, float]:
        """Loss per unit weight of a batch of equal samples, and its spread over seeds at the smallest size.

        Equal samples make the result independent of the size even for layers that mix the batch. None where it
        may depend on the size and the gradient is exact all the same. Waits for the device.
        """
        if not self._engine.step.strategy.needs_sum_over_samples:
            return None, 0.0
        seeds = NOISE_SEEDS if self._reference.loss is None else 1
        losses = []
        for seed in range(seeds):
            self._engine.step.random.start((seed,), None)
            self._engine.last_loss_sums()  # forget what came before
            self._engine.micro_step(*same)
            loss, weight = self._engine.last_loss_sums()
            losses.append(float(loss) / float(weight) if weight else math.nan)
        if math.isnan(losses[0]) and not any(same[1].values()):
            return None, 0.0  # the sample weighs nothing: no opinion
        return losses[0], statistics.pstdev(losses) if all(map(math.isfinite, losses)) else 0.0

    def _repeated_loss(self, same: tuple[Batch, Mapping[str, float]], loss: float | None) -> float | None:
        """The loss once more with the same seed, where it disagrees with the smallest size's: does this batch
        even agree with itself?"""
        reference, precision = self._reference, self._engine.settings.precision
        if loss is None or reference.loss is None:
            return None
        if not disagrees(loss, reference.loss, reference.noise, precision):
            return None
        return self._loss_of_one_sample(same)[0]

    def _close_step(self) -> tuple[Failure | None, float, float]:
        """Reduction and update, timed: (failure of any rank, reduce_s, optimizer_s). Collective."""
        self._peers.gather(None)  # so that waiting for a slower rank is not taken for the reduction
        try:
            reduce_s = self._timed(self._engine.reduce)
        except Exception as error:
            if is_out_of_memory(error):
                raise DoesNotFitError(
                    f"out of memory in the gradient reduction: {_first_line(error)}"
                ) from error
            raise
        seconds: list[float] = []
        self._updates += 1
        failure = attempt(lambda: seconds.append(self._timed(lambda: self._engine.update(self._updates))))
        return self._peers.worst(failure), reduce_s, seconds[0] if seconds else math.nan

    def _cycles(self, batches: Sequence[Any], slowest: float) -> tuple[Failure | None, SizeTimes]:
        """Full steps with every part timed; more of them where the repeats of any rank disagree. Collective.

        Args:
            batches: on the device, each with its scale; taken in turn.
            slowest: seconds of a micro-step on the slowest rank, so that all ranks choose the same repeats.
        """
        repeats = max(repeats_for(slowest, self._device.type), CYCLES * len(batches))
        times = SizeTimes(self._device.type, [[] for _ in batches])

        def micro_steps() -> None:
            marks = [self._meter.mark()]
            for nth in range(-(-repeats // CYCLES)):
                self._passes(*batches[nth % len(batches)])
                marks.append(self._meter.mark())
            # read only now: on a GPU the marks were queued, and the host waits once
            for nth, (start, end) in enumerate(itertools.pairwise(marks)):
                times.micro_s[nth % len(batches)].append(self._meter.seconds(start, end))

        cycles, began = 0, time.perf_counter()
        while True:
            failure = self._peers.worst(attempt(micro_steps))
            if failure is None:
                failure, reduced, updated = self._close_step()
                times.reduce_s.append(reduced)
                times.optimizer_s.append(updated)
            if failure is not None:
                return failure, times
            cycles += 1
            if cycles == CYCLES:
                began = time.perf_counter()
            if cycles < CYCLES:
                continue
            is_over = time.perf_counter() - began > MORE_S[self._device.type]
            said = self._peers.gather((times.spread, is_over))
            if max(spread for spread, _ in said) <= DIFFERS or said[0][1] or cycles == CYCLES + MORE_CYCLES:
                return None, times
            times.again = 1

    def _summary(
        self,
        size: int,
        loss: float | None,
        noise: float,
        times: SizeTimes,
    ) -> Measurement:
        """Compare notes: slowest rank's times, largest peak, the loss that is furthest off. Collective."""
        peak, fragmentation = self._memory.peak(), self._memory.fragmentation()
        # a long run cuts memory up further than a few steps: there must be room for as much again
        over = max(peak - self._memory.budget_bytes, peak + fragmentation - self._memory.free_bytes())
        mine = (
            times.typical_s,
            min(times.reduce_s),
            min(times.optimizer_s),
            peak,
            over,
            loss,
            times.noise,
            fragmentation,
            (times.spread, times.range_s),
        )
        every = self._peers.gather(mine)
        losses = [each[5] for each in every]
        reference = self._reference
        if reference.loss is None and losses[0] is not None:
            reference.loss, reference.noise = losses[0], max(self._peers.gather(noise))
        worst_over = max(each[4] for each in every)
        return Measurement(
            micro_batch=size,
            outcome=DOES_NOT_FIT if worst_over > 0 else FITS,
            peak_memory_bytes=max(each[3] for each in every),
            fragmentation_bytes=max(each[7] for each in every),
            micro_step_s=max(each[0] for each in every),
            reduce_s=max(each[1] for each in every),
            optimizer_s=max(each[2] for each in every),
            loss=_furthest(losses, reference.loss),
            reference_loss=reference.loss,
            loss_noise=reference.noise,
            error=f"its peak is {units.size(worst_over)} above what may be used" if worst_over > 0 else None,
            rank_s=tuple(each[0] for each in every),
            noise=max(each[6] for each in every),
            spread=max(each[8] for each in every)[0],
            range_s=max(each[8] for each in every)[1],
            again=times.again,
        )

    def _drop_gradients(self) -> None:
        for parameter in self._engine.model.parameters():
            parameter.grad = None
        gc.collect()  # an exception's traceback can hold a whole graph


@dataclass
class SizeTimes:
    """What one rank saw of one size: seconds of the micro-steps of each batch, of reductions and of updates."""

    device: str
    micro_s: list[list[float]]
    reduce_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    again: int = 0

    @property
    def typical_s(self) -> float:
        """Seconds of a micro-step; batches of different lengths are all part of the answer."""
        return statistics.fmean(TYPICAL[self.device](each) for each in self.micro_s)

    @property
    def spread(self) -> float:
        """Part by which repeats differ, for the batch whose repeats differ most."""
        return max(spread_of(each, self.device) for each in self.micro_s)

    @property
    def range_s(self) -> tuple[float, float]:
        """Fastest and slowest repeat of that batch."""
        each = max(self.micro_s, key=lambda seconds: spread_of(seconds, self.device))
        return min(each), max(each)

    @property
    def noise(self) -> float:
        """Part by which `typical_s` may be wrong, as far as repeats tell: the standard error on a GPU."""
        if (
            self.device == "cpu"
        ):  # short micro-steps slip through where others use the machine, long ones do not
            return max(statistics.median(each) / max(min(each), 1e-12) - 1 for each in self.micro_s) / 2
        return max(standard_error(each) for each in self.micro_s)


def spread_of(seconds: Sequence[float], device: str) -> float:
    """Part by which repeats differ, in the sense in which `TYPICAL` reads them: on a CPU how far a quarter of them
    is from the fastest, on a GPU the middle half from each other."""
    ranked = sorted(seconds)
    if device == "cpu":
        return ranked[max(1, len(ranked) // 4) if len(ranked) > 1 else 0] / max(ranked[0], 1e-12) - 1
    quarter = len(ranked) // 4
    return (ranked[-1 - quarter] - ranked[quarter]) / max(statistics.median(ranked), 1e-12)


def standard_error(seconds: Sequence[float]) -> float:
    """Standard error of the mean of repeated times, as a part of their mean."""
    mean = statistics.fmean(seconds)
    return statistics.pstdev(seconds) / mean / math.sqrt(len(seconds)) if mean > 0 else 0.0


def repeats_for(micro_step_s: float, device: str) -> int:
    """How many micro-steps to time: enough to be stable, few enough for the time limit."""
    lowest, highest = REPEATS[device]
    return min(highest, max(lowest, round(TARGET_S[device] / max(micro_step_s, 1e-9))))


def predicted_seconds(last: Measurement, size: int, device: str) -> float:
    """Seconds that measuring ``size`` will take, from a smaller size's times in proportion."""
    micro_step_s = (last.micro_step_s or 0.0) * size / last.micro_batch
    micro_steps = 2 + WARM_UPS[device] + repeats_for(micro_step_s, device)
    return micro_steps * micro_step_s + (1 + CYCLES) * ((last.reduce_s or 0.0) + (last.optimizer_s or 0.0))


def attempt(work: Callable[[], object]) -> Failure | None:
    """Run what may fail on this rank alone. gatrain's own errors are wrong at every size: they pass, but where
    memory ran out under them."""
    try:
        work()
    except Exception as error:
        if is_out_of_memory(error):
            return Failure(DOES_NOT_FIT, _first_line(error))
        if isinstance(error, GatrainError):
            raise
        frame = user_frames(error, most=1)
        place = f" at {frame[-1].filename}:{frame[-1].lineno}" if frame else ""
        return Failure(FAILED, f"{type(error).__name__}: {_first_line(error)}{place}")
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:300] or type(error).__name__


def _furthest(losses: Sequence[float | None], reference: float | None) -> float | None:
    """The loss that disagrees most with the reference; nan disagrees more than any number."""
    given = [loss for loss in losses if loss is not None]
    if not given or reference is None:
        return given[0] if given else None
    with contextlib.suppress(StopIteration):
        return next(loss for loss in given if math.isnan(loss))
    return max(given, key=lambda loss: abs(loss - reference))
