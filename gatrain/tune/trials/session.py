"""The ranks of trial processes, forked by `gatrain.tune.host`.

For each request they walk through the sizes of its `gatrain.tune.protocol.TrialSpec` in rising order; rank 0 writes
a line after each. All decisions to go on or stop are taken together. Model, batches and compiled code stay warm
from one request to the next.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from gatrain import build, codec, units
from gatrain.compose import load_config
from gatrain.config import RunConfig
from gatrain.errors import DoesNotFitError, is_out_of_memory
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, SKIPPED, Measurement, StepSettings
from gatrain.rank import Rank
from gatrain.rundir import RunDir, read_json
from gatrain.tasks.base import Task
from gatrain.train import cuda_graphs
from gatrain.train.check import check_before_first_step
from gatrain.train.checkpointing import available_modes
from gatrain.train.engine import Engine
from gatrain.train.knobs import Knobs
from gatrain.train.lengths import notice_lengths
from gatrain.tune import curve, protocol
from gatrain.tune.memory_model import between, fit_line
from gatrain.tune.protocol import TrialSpec
from gatrain.tune.trials.batches import TrialBatches
from gatrain.tune.trials.full_step import FullStepTimer
from gatrain.tune.trials.measure import (
    Peers,
    Reference,
    SizeMeter,
    predicted_seconds,
)
from gatrain.tune.trials.memory import Memory, memory_of, predicted_peak

TREND_GAIN, TREND_FALL = 0.01, 0.02
"""Two sizes in a row that gain less than the one, or lose more than the other, end the rise."""
TREND_SIGMAS = 3.0
"""Standard errors by which a size must be slower to be called so."""
GAIN_TO_EXTEND_DEADLINE = 1.2
SHARE_OF_BUDGET = 0.25
"""Part of the remaining time that the largest size may take once the curve is level."""
MAX_FAILURES = 2
MAX_REPEATS = 3
"""Times that a size is measured again, at most."""
REFINEMENTS, WORTH_REFINING = 2, 0.03
IDLE_FACTOR, IDLE_SIZES_BELOW = 1.2, 16
"""A size that takes less than this factor longer than a smaller one waits for the host; only sizes below this part
of the share are left out for it."""
SMALLEST_GAP = {"cpu": 4, "cuda": 2}
"""Samples between a size that fits and one that does not, below which nothing in between is tried."""
CHECKED = 4
"""Samples on which the loss is checked before the first size."""
NO_UPDATE_LR = 1e-30
"""Learning rate of trials: the update does its work and moves nothing, so all sizes see the same weights."""


class TrialLog:
    """Rank 0's side of ``trials.jsonl``."""

    def __init__(self, folder: Path, is_writer: bool) -> None:
        self._file = open(folder / protocol.LINES, "a", encoding="utf-8") if is_writer else None  # noqa: SIM115

    def write(self, event: str, **content: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **content}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def work(folder: Path, this: Rank) -> None:
    """Answer requests until the host is killed. Every rank runs it, and all see the same requests."""
    _to_log(folder, this)
    desk = TrialSession(this, compiles=bool(read_json(folder / protocol.WORLD)["compiles"]))
    pending = protocol.requests(folder)
    while True:
        told = desk.peers.gather((next(pending) if this.rank == 0 else None, this.stop_requested))
        if any(stops for _, stops in told):
            return
        found, _ = told[0]
        if found is None:
            continue
        is_usable = desk.answer(Path(found))
        desk.peers.gather(None)  # nobody needs the folder any more
        if this.rank == 0:
            (Path(found) / protocol.ANSWERED).touch()
        if not is_usable:
            return  # a GPU error spoils whatever follows: the next request starts other processes


class TrialSession:
    """What ranks keep between requests: the task, one engine with its model, the reference losses, the budget."""

    def __init__(self, this: Rank, *, compiles: bool) -> None:
        self.peers = Peers(this)
        self._rank = this
        self._memory: Memory | None = None
        self._config: RunConfig | None = None
        self._batches: TrialBatches | None = None
        self._knobs = Knobs({})
        self._engine: Engine | None = None
        self._is_checked = False
        self._references: dict[str, Reference] = {}
        self._notices: list[str] = []
        # sizes that each way has computed: compiled, if it compiles
        self._warm: dict[StepSettings, set[int]] = {}
        if this.device.type == "cuda":  # what takes time, while the parent still looks around
            torch.zeros(1, device=this.device)  # makes the context
            torch.set_num_threads(min(4, torch.get_num_threads()))  # more wait for each other in a collate
            if compiles:
                from torch._inductor.async_compile import AsyncCompile

                AsyncCompile.warm_pool()

    def answer(self, folder: Path) -> bool:
        """Measure what the folder's spec asks for; returns whether these processes may go on. Collective."""
        asked = TrialSpec.read(folder)
        lines = TrialLog(folder, self._rank.rank == 0)
        memory = self._memory = self._memory or memory_of(self._rank, asked.memory_fraction)
        config = load_config(folder / protocol.CONFIG)
        config = dataclasses.replace(config, optimizer=config.optimizer.held_still(NO_UPDATE_LR))
        batches = self._prepare(config)
        with self._knobs.applied(asked.settings.knobs):
            engine, rise, stopped = self._sweep(asked, config, batches, memory, lines)
        if asked.full_steps is not None and stopped not in (curve.INTERRUPTED, curve.BROKEN):
            timer = FullStepTimer(
                config,
                batches,
                this=self._rank,
                peers=self.peers,
                first=engine,
                warm=self._warm,
                knobs=self._knobs,
            )
            confirmation = timer.run(asked.full_steps)
            if confirmation is not None:
                lines.write("full_steps", confirmation=codec.encode(confirmation))
            del timer  # and with it the engines of the other ways
            gc.collect()
        return stopped != curve.BROKEN or not rise.is_broken()

    def _sweep(
        self, asked: TrialSpec, config: RunConfig, batches: TrialBatches, memory: Memory, lines: TrialLog
    ) -> tuple[Engine, SizeSweep, str]:
        """The sizes that were asked for, and why there are no larger ones. Collective."""
        try:
            engine = self._engine_for(asked.settings, config, batches.task)
            modes = available_modes(engine.model)
        except Exception as error:
            if is_out_of_memory(error):
                raise DoesNotFitError(
                    f"the model itself does not fit in memory, before any sample: {str(error).splitlines()[0]} "
                    "Use a smaller model, or a GPU that no other process uses."
                ) from error
            raise
        if asked.check and not self._is_checked:
            self._is_checked = True
            lines.write("checking")
            for notice in _check_loss(engine, config):
                lines.write("notice", text=notice)
        budget_bytes = min(self.peers.gather(memory.budget_bytes))
        for notice in self._notices:
            lines.write("notice", text=notice)
        # the same on every rank: rank 0's counts
        offers = self.peers.gather(self._knobs.offers(self._rank.device))[0]
        lines.write("ready", modes=list(modes), knobs=offers, budget_bytes=budget_bytes, at=time.time())
        reference = self._references.setdefault(asked.settings.precision, Reference())
        meter = SizeMeter(engine, batches, self._rank, self.peers, memory, reference)
        rise = SizeSweep(asked, meter, self.peers, memory, lines, self._rank)
        stopped = rise.run()
        lines.write("end", stopped=stopped)  # the curve is complete, whatever becomes of the full steps
        self._warm.setdefault(asked.settings, set()).update(m.micro_batch for m in rise.measured)
        return engine, rise, stopped

    def _prepare(self, config: RunConfig) -> TrialBatches:
        """The task and its batches, made once: a tuning asks about one configuration."""
        if self._batches is None or config != self._config:
            self._config, self._engine, self._is_checked = config, None, False
            task, self._knobs = build.build_task(config), build.build_knobs(config)
            found = notice_lengths(task, config.train.seed)
            # where reading is slow, ranks may have seen fewer samples than others
            task.variable_length = any(self.peers.gather(found.vary))
            self._notices = [found.sentence] if found.sentence else []
            self._batches = TrialBatches(task, config.train.seed)
        return self._batches

    def _engine_for(self, settings: StepSettings, config: RunConfig, task: Task) -> Engine:
        """The engine of the last request if it computes in the same way, else another. Collective."""
        if self._engine is not None and self._engine.settings == settings:
            return self._engine
        had_compiled = self._engine is not None and self._engine.settings.compile
        self._engine = None
        gc.collect()  # a model with its optimizer may be held by a cycle
        if had_compiled:
            torch.compiler.reset()
            cuda_graphs.forget()
            self._warm.clear()
        if self._memory is not None:
            self._memory.release()
        self._engine = build.build_engine(task, config, settings, self._rank.device, in_place=True)
        return self._engine


def _check_loss(engine: Engine, config: RunConfig) -> list[str]:
    """Measuring what may not be split would be in vain. A few samples only: nobody knows yet what fits.
    Collective."""
    samples = len(engine.task.train_data)
    schedule = build.window_schedule(config, engine.task, min(config.batch.largest, samples))
    return check_before_first_step(engine, config, schedule, 0, CHECKED, lenient=True)


def _to_log(folder: Path, this: Rank) -> None:
    """What the user's model prints goes to the log on rank 0, too: the others write there already."""
    if this.rank != 0:
        return
    with open(RunDir(folder).rank_log(this.rank), "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


class SizeSweep:
    """The walk through rising sizes, and the reasons to end it. Every rank runs it in step."""

    def __init__(
        self, asked: TrialSpec, meter: SizeMeter, peers: Peers, memory: Memory, lines: TrialLog, this: Rank
    ) -> None:
        self._asked = asked
        self._meter = meter
        self._peers = peers
        self._memory = memory
        self._lines = lines
        self._rank = this
        self._deadline = time.monotonic() + asked.seconds
        self._base = memory.base()
        self._points: list[tuple[int, int]] = []
        self.measured: list[Measurement] = []
        self._rates: list[tuple[int, float]] = []
        self._last_fit: Measurement | None = None
        self._wall_s = -1.0  # seconds of the last size, everything included
        self._failures = 0

    def run(self) -> str:
        """Measure sizes until one of the reasons of `gatrain.tune.curve` says stop; return it. Collective."""
        sizes = list(self._asked.sizes)
        while sizes:
            size = sizes.pop(0)
            stop = self._stop_before(size)
            if stop == curve.MEMORY:
                self._refine(size)
            if stop is not None:
                return stop
            self._lines.write("start", micro_batch=size)
            began = time.perf_counter()
            measured = self._meter.measure(size)
            self._note(measured, time.perf_counter() - began)
            if measured.outcome == DOES_NOT_FIT:
                self._refine(size)
                return curve.MEMORY
            if self._failures >= MAX_FAILURES or (measured.outcome == FAILED and self.is_broken()):
                return curve.BROKEN
            self._measure_doubtful()
            sizes = self._without_idle(sizes)
            trend = self._trend() if self._asked.stop_early and len(sizes) > 0 else None
            if trend == curve.SLOWER:
                return trend
            if trend == curve.LEVEL:
                # no gain in sight, but the whole share at once would save the accumulation
                return self._last(sizes[-1])
        return curve.SHARE

    def _measure_doubtful(self) -> None:
        """Measure again what other sizes contradict, while there is time for it. Collective."""
        for size in curve.doubtful(self.measured) if self._asked.stop_early else ():
            before = next(m for m in self.measured if m.micro_batch == size)
            needed = predicted_seconds(before, size, self._rank.device.type)
            left = self._deadline - time.monotonic()
            # rank 0's clock decides for all
            if before.again >= MAX_REPEATS or self._peers.gather(needed > SHARE_OF_BUDGET * left)[0]:
                continue
            self._lines.write("start", micro_batch=size)
            self._replace(before.with_repeat(self._meter.measure(size)))

    def _replace(self, measured: Measurement) -> None:
        """Put a size that was measured again in the place of what was known of it."""
        self._lines.write("trial", measurement=codec.encode(measured))
        size = measured.micro_batch
        self.measured = [measured if m.micro_batch == size else m for m in self.measured]
        fitting = [m for m in self.measured if m.outcome == FITS and m.micro_step_s]
        self._rates = [(m.micro_batch, m.micro_batch / (m.micro_step_s or 1.0)) for m in fitting]
        self._last_fit = fitting[-1] if fitting else None

    def _without_idle(self, sizes: list[int]) -> list[int]:
        """Leave out the next size where the last ones kept the GPU waiting: it will take as long as they do."""
        if (
            not self._asked.stop_early
            or self._rank.device.type == "cpu"
            or len(sizes) < 3
            or len(self._rates) < 2
        ):
            return sizes
        (low, low_rate), (high, high_rate) = self._rates[-2:]
        took_as_long = high / high_rate < IDLE_FACTOR * low / low_rate
        return sizes[1:] if took_as_long and sizes[0] <= self._asked.sizes[-1] // IDLE_SIZES_BELOW else sizes

    def _note(self, measured: Measurement, seconds: float) -> None:
        self._lines.write("trial", measurement=codec.encode(measured))
        self.measured.append(measured)
        size = measured.micro_batch
        self._failures = self._failures + 1 if measured.outcome == FAILED else 0
        self._wall_s = max(self._peers.gather(seconds))
        if measured.outcome == FITS and measured.micro_step_s:
            self._last_fit = measured
            self._rates.append((size, size / measured.micro_step_s))
        if measured.peak_memory_bytes is not None:
            self._points.append((size, self._memory.peak()))

    def _stop_before(self, size: int) -> str | None:
        """Interrupted, out of time, or predicted not to fit (the last two leave a line). Collective."""
        if any(self._peers.gather(self._rank.stop_requested)):
            return curve.INTERRUPTED
        if self._wall_s < 0:
            return None  # the first size is always tried
        left = self._deadline - time.monotonic() + (self._asked.patience_s if self._is_gaining() else 0.0)
        needed = self._predicted_seconds(size)
        # rank 0's clock decides for all
        if self._peers.gather(needed > left)[0]:
            self._skip(size, protocol.no_time(needed, left))
            return curve.TIME
        over = max(self._peers.gather(self._over(size)))
        if over > 0:
            self._skip(size, f"its predicted peak is {units.size(over)} above what may be used")
            return curve.MEMORY
        return None

    def _over(self, size: int) -> float:
        """Bytes by which ``size`` is predicted to exceed this rank's budget; in doubt not above 0.

        On a GPU an error says in the end what does not fit, so only what clearly cannot is left out; on a CPU
        the kernel would kill somebody's process, so what is predicted not to fit is not tried.
        """
        budget = self._memory.budget_bytes
        if self._rank.device.type == "cpu":
            return predicted_peak(self._points, self._base, size) - budget
        line = fit_line(self._points)
        if line is None or not line.clearly_exceeds(size, budget):
            return 0.0
        return line.peak(size) - budget

    def _refine(self, refused: int) -> None:
        """Try up to `REFINEMENTS` sizes between the largest that fits and the smallest that does not, while
        larger ones were still clearly faster. Collective."""
        for _ in range(REFINEMENTS):
            if not (
                self._asked.stop_early and self._last_fit and len(self._rates) > 1 and self._still_rises()
            ):
                return
            gap = SMALLEST_GAP[self._rank.device.type]
            size = between(self._last_fit.micro_batch, refused, gap)
            if size is None:
                return
            stop = self._stop_before(size)
            if stop is None:
                self._lines.write("start", micro_batch=size)
                began = time.perf_counter()
                measured = self._meter.measure(size)
                self._note(measured, time.perf_counter() - began)
                if measured.outcome == FAILED:
                    return
            elif stop != curve.MEMORY:
                return
            if stop is not None or measured.outcome != FITS:
                refused = size

    def _still_rises(self) -> bool:
        """Whether the largest size that fits is clearly faster per sample than the one before it."""
        return self._rates[-1][1] > (1 + WORTH_REFINING) * self._rates[-2][1]

    def _is_gaining(self) -> bool:
        """Whether the last size was much faster per sample than the one before: the best is still ahead."""
        return len(self._rates) < 2 or self._rates[-1][1] > GAIN_TO_EXTEND_DEADLINE * self._rates[-2][1]

    def _skip(self, size: int, text: str) -> None:
        self._lines.write("trial", measurement=codec.encode(Measurement(size, SKIPPED, error=text)))

    def _predicted_seconds(self, size: int) -> float:
        """Of measuring ``size``: its micro-steps and, where each size is compiled, that once more."""
        compiling = self._wall_s if self._asked.settings.compile else 0.0
        if self._last_fit is None:
            return self._wall_s
        return max(compiling, predicted_seconds(self._last_fit, size, self._rank.device.type))

    def is_broken(self) -> bool:
        """Whether a GPU took an error that spoils what follows, such as an illegal address. Collective."""
        broken = False
        if self._rank.device.type == "cuda":
            try:
                torch.cuda.synchronize(self._rank.device)
            except Exception:
                broken = True
        return any(self._peers.gather(broken))

    def _trend(self) -> str | None:
        """What the last two sizes say, by times that all ranks share."""
        if len(self._rates) < 3:
            return None
        best = max(rate for _, rate in self._rates[:-2])
        last_two = [rate for _, rate in self._rates[-2:]]
        noise = max((m.noise or 0.0 for m in self.measured[-2:]), default=0.0)
        if all(rate < best * (1 - max(TREND_FALL, TREND_SIGMAS * noise)) for rate in last_two):
            return curve.SLOWER
        return curve.LEVEL if all(rate < best * (1 + TREND_GAIN) for rate in last_two) else None

    def _last(self, size: int) -> str:
        """Try the largest size if that is cheap. Collective."""
        left = self._deadline - time.monotonic()
        if self._peers.gather(self._predicted_seconds(size) > SHARE_OF_BUDGET * left)[0]:
            return curve.LEVEL
        if self._stop_before(size) is None:
            self._lines.write("start", micro_batch=size)
            self._note(self._meter.measure(size), 0.0)
            self._measure_doubtful()
        return curve.LEVEL
