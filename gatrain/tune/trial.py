"""Trial processes: ``python -m gatrain.tune.trial FOLDER`` on each rank, under the launcher that training
uses.

One warm process per rank walks through the sizes of `gatrain.tune.spec.TrialSpec` in rising order and rank 0
writes a line after each. All decisions to go on or stop are taken together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from gatrain import build, rank
from gatrain.compose import load_config
from gatrain.errors import DoesNotFitError
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, SKIPPED
from gatrain.rank import Rank
from gatrain.rundir import RunDir
from gatrain.tune import confirm, curve, spec
from gatrain.tune.curve import Measurement
from gatrain.tune.estimate import memory_text
from gatrain.tune.measure import Peers, SizeMeter, is_out_of_memory, predicted_seconds
from gatrain.tune.memory import Memory, memory_of, predicted_peak
from gatrain.tune.memory_model import between, fit_line
from gatrain.tune.spec import TrialSpec
from gatrain.tune.whole import WholeStepTimer, close_calls

LEVEL_GAIN, FALL = 0.01, 0.02
"""Two sizes in a row that gain less than the one, or lose more than the other, end the rise."""
SURE = 3.0
"""Standard errors by which a size must be slower to be called so."""
MUCH = 1.2
SHARE_OF_BUDGET = 0.25
"""Part of the remaining time that the largest size may take once the curve is level."""
MAX_FAILURES = 2
REFINEMENTS, WORTH_REFINING = 2, 0.03
SMALLEST_GAP = {"cpu": 4, "cuda": 2}
"""Samples between a size that fits and one that does not, below which nothing in between is tried."""
STILL = 1e-30
"""Learning rate of trials: the update does its work and moves nothing, so all sizes see the same weights."""


class Lines:
    """Rank 0's side of ``trials.jsonl``."""

    def __init__(self, folder: Path, is_writer: bool) -> None:
        self._file = open(folder / spec.LINES, "a", encoding="utf-8") if is_writer else None  # noqa: SIM115

    def write(self, event: str, **content: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **content}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def work(folder: Path, this: Rank) -> None:
    """Measure what the folder's spec asks for. Every rank runs it."""
    asked = TrialSpec.read(folder)
    lines = Lines(folder, this.rank == 0)
    _to_log(folder, this)
    peers = Peers(this)
    memory = memory_of(this, asked.memory_fraction)
    config = load_config(folder / spec.CONFIG)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=STILL))
    finalists = asked.whole.finalists if asked.whole else ()
    if asked.settings.compile or any(each.settings.compile for each in finalists):
        import torch._dynamo

        # one compilation for each size and each remainder: beyond the default limit of 8 a function would
        # silently run uncompiled
        torch._dynamo.config.recompile_limit = 16 + 2 * len(asked.sizes)
    try:
        task = build.build_task(config)
        modes = build.available_checkpointing(task)
        engine = build.build_engine(task, config, asked.settings, this.device)
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(
                f"the model itself does not fit in memory, before any sample: {str(error).splitlines()[0]} "
                "Use a smaller model, or a GPU that no other process uses."
            ) from error
        raise
    lines.write("ready", modes=list(modes), budget_bytes=min(peers.gather(memory.budget_bytes)))
    rise = Rise(asked, SizeMeter(engine, task, this, peers, memory), peers, memory, lines, this)
    stopped = rise.run()
    lines.write("end", stopped=stopped)  # the curve is complete, whatever becomes of the whole steps
    if asked.whole is not None and stopped not in (curve.INTERRUPTED, curve.BROKEN):
        timer = WholeStepTimer(config, task, this, peers, {asked.settings: engine})
        options = [] if asked.whole.finalists else close_calls(asked, rise.measured, stopped)
        confirmation = timer.run(asked.whole, options)
        if confirmation is not None:
            lines.write("whole", confirmation=confirm.to_dict(confirmation))


def _to_log(folder: Path, this: Rank) -> None:
    """What the user's model prints must not reach standard output, which may be one JSON object."""
    with open(RunDir(folder).rank_log(this.rank), "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


class Rise:
    """The walk through rising sizes, and the reasons to end it. Every rank runs it in step."""

    def __init__(
        self, asked: TrialSpec, meter: SizeMeter, peers: Peers, memory: Memory, lines: Lines, this: Rank
    ) -> None:
        self._asked = asked
        self._meter = meter
        self._peers = peers
        self._memory = memory
        self._lines = lines
        self._rank = this
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
            if self._failures >= MAX_FAILURES or (measured.outcome == FAILED and self._is_broken()):
                return curve.BROKEN
            trend = self._trend() if self._asked.rises and len(sizes) > 0 else None
            if trend == curve.SLOWER:
                return trend
            if trend == curve.LEVEL:
                # no gain in sight, but the whole share at once would save the accumulation
                return self._last(sizes[-1])
        return curve.SHARE

    def _note(self, measured: Measurement, seconds: float) -> None:
        self._lines.write("trial", measurement=dataclasses.asdict(measured))
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
        left = self._asked.deadline - time.time() + (self._asked.patience_s if self._is_gaining() else 0.0)
        needed = self._predicted_seconds(size)
        # rank 0's clock decides for all
        if self._peers.gather(needed > left)[0]:
            self._skip(size, f"no time: it would take about {needed:.0f} s, {max(left, 0):.0f} s are left")
            return curve.TIME
        over = max(self._peers.gather(self._over(size)))
        if over > 0:
            self._skip(size, f"its predicted peak is {memory_text(over)} above what may be used")
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
            if not (self._asked.rises and self._last_fit and len(self._rates) > 1 and self._still_rises()):
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
        return len(self._rates) < 2 or self._rates[-1][1] > MUCH * self._rates[-2][1]

    def _skip(self, size: int, text: str) -> None:
        self._lines.write("trial", measurement=dataclasses.asdict(Measurement(size, SKIPPED, error=text)))

    def _predicted_seconds(self, size: int) -> float:
        """Of measuring ``size``: its micro-steps and, where each size is compiled, that once more."""
        compiling = self._wall_s if self._asked.settings.compile else 0.0
        if self._last_fit is None:
            return self._wall_s
        return max(compiling, predicted_seconds(self._last_fit, size, self._rank.device.type))

    def _is_broken(self) -> bool:
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
        if all(rate < best * (1 - max(FALL, SURE * noise)) for rate in last_two):
            return curve.SLOWER
        return curve.LEVEL if all(rate < best * (1 + LEVEL_GAIN) for rate in last_two) else None

    def _last(self, size: int) -> str:
        """Try the largest size if that is cheap. Collective."""
        left = self._asked.deadline - time.time()
        if self._peers.gather(self._predicted_seconds(size) > SHARE_OF_BUDGET * left)[0]:
            return curve.LEVEL
        if self._stop_before(size) is None:
            self._lines.write("start", micro_batch=size)
            self._note(self._meter.measure(size), 0.0)
        return curve.LEVEL


if __name__ == "__main__":
    rank.main(work)
