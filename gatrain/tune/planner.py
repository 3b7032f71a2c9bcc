"""From a config to a plan: what must be measured, in which order, and what the answer is.

The order: without checkpointing and uncompiled first, then the other modes of checkpointing if memory keeps
a larger micro-batch from being tried while larger ones were still gaining, then the best few sizes compiled
(compilation takes long: it is never tried along a whole curve).
A curve that the cache holds is not measured again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from gatrain import batch
from gatrain.config import RunConfig
from gatrain.errors import DoesNotFitError, WorkerError
from gatrain.launch.nodes import Nodes
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, Plan, StepSettings, Trial, make_plan
from gatrain.tune import cache, curve, search, settings
from gatrain.tune.curve import Curve
from gatrain.tune.estimate import DataInfo, memory_per_rank, memory_text
from gatrain.tune.hardware import Hardware
from gatrain.tune.rounds import Launch, Progress, Run, TrialRunner
from gatrain.tune.search import Candidate
from gatrain.tune.settings import Question

MAX_SECONDS = {"cpu": 30.0, "cuda": 120.0}
"""Time for trials where ``tune.max_seconds`` is null."""
STILL_GAINING = 1.05
"""A last doubling that gained more than this says that larger micro-batches could be faster still."""
COMPILED_SIZES = 2
MIN_ROUND_S = {"cpu": 5.0, "cuda": 15.0}
"""Seconds that must be left to start another set of processes."""


class Planner:
    """One question, answered from the cache and from trials."""

    def __init__(
        self,
        config: RunConfig,
        info: DataInfo,
        hardware: Hardware,
        nodes: Nodes,
        question: Question,
        *,
        progress: Progress,
        retune: bool = False,
        cwd: Path | None = None,
        run: Run | None = None,
    ) -> None:
        self._config = config
        self._hardware = hardware
        self._question = question
        self._progress = progress
        self._effective = config.batch.effective
        self._world_size = nodes.world_size
        self._local_ranks = nodes.nproc
        self._share = batch.largest_share(self._effective, self._world_size)
        self._key = cache.fingerprint(config, info, hardware, self._world_size, cwd)
        self._curves: dict[StepSettings, Curve] = {} if retune else cache.load_curves(self._key)
        self._used: dict[StepSettings, Curve] = {}
        self._measured_anything = False
        limit = config.tune.max_seconds or MAX_SECONDS[hardware.device]
        self._max_seconds = limit
        launch = run or Launch(nodes, hardware.device, cwd)
        self._runner = TrialRunner(config, launch, limit, self._keep, progress)

    def plan(self) -> Plan:
        """Measure what is missing and choose.

        Raises:
            DoesNotFitError: not even the smallest size fits.
            WorkerError: every size failed for another reason.
        """
        asked = self._question.base
        # Each size compiles for long, so even where compilation is asked for the curve is found without it.
        explores = asked.compile and self._question.fixed_micro_batch is None
        first = dataclasses.replace(asked, compile=False) if explores else asked
        base = self._curve(first, self._sizes())
        if self._question.tries_checkpointing:
            self._try_checkpointing(base)
        if (self._question.tries_compile or explores) and self._options():
            self._try_compiled(required=explores)
        elif explores:
            self._curve(asked, self._sizes())  # fused kernels may fit where the plain ones do not
        options = [option for option in self._options() if option.settings.compile or not asked.compile]
        if not options:
            self._refuse()
        return self._answer(search.choose(options), options)

    def _sizes(self) -> list[int]:
        fixed = self._question.fixed_micro_batch
        return search.candidate_sizes(self._share) if fixed is None else [fixed]

    def _curve(self, way: StepSettings, sizes: list[int], *, rises: bool = True) -> Curve:
        """The curve for one way of computing, from the cache if it can answer, with wrong results refused."""
        known = self._curves.get(way)
        fixed = self._question.fixed_micro_batch
        if known is None:
            answered = False
        elif fixed is not None:
            answered = fixed in {m.micro_batch for m in known.fitting}
        elif rises:
            answered = known.answers(sizes, self._max_seconds)
        else:
            answered = self._covers(known, sizes[0])
        if known is not None and answered:
            allowed = memory_per_rank(self._hardware, self._local_ranks) * self._config.tune.memory_fraction
            self._used[way] = search.reject_wrong_losses(known.within(int(allowed)))
        else:
            missing = self._missing(known, sizes)
            self._measured_anything = True
            self._runner.measure(way, missing, rises=rises and fixed is None)
            self._used[way] = search.reject_wrong_losses(self._curves[way])
        return self._used[way]

    @staticmethod
    def _covers(known: Curve, best: int) -> bool:
        """Whether a curve of a few chosen sizes says enough about ``best``, the size that matters most."""
        if known.stopped == curve.INTERRUPTED or not known.measurements:
            return False
        smallest, largest = known.measurements[0].micro_batch, known.measurements[-1].micro_batch
        return smallest <= best and (best <= largest or known.stopped != curve.SHARE)

    @staticmethod
    def _missing(known: Curve | None, sizes: list[int]) -> list[int]:
        """Sizes to measure now: all but those known to fit or fail; never none."""
        done = {m.micro_batch for m in known.measurements if m.outcome in (FITS, FAILED)} if known else set()
        return [size for size in sizes if size not in done] or sizes

    def _keep(self, measured: Curve) -> None:
        """Merge with what the cache knew, and store at once: also on Ctrl-C."""
        known = self._curves.get(measured.settings)
        if known is not None and self._question.fixed_micro_batch is not None:
            # one size more says nothing about why the curve ended
            measured = dataclasses.replace(measured, stopped=known.stopped, max_seconds=known.max_seconds)
        self._curves[measured.settings] = known.with_new(measured) if known else measured
        trouble = cache.store_curves(self._key, self._curves)
        if trouble is not None:
            self._progress(trouble)

    def _try_checkpointing(self, base: Curve) -> None:
        """Recomputation costs time, so it can only win where memory forbids a size that would be faster."""
        largest = base.fitting[-1].micro_batch if base.fitting else 0
        if base.stopped != curve.MEMORY or largest >= self._share:
            return
        if base.fitting and self._question.fixed_micro_batch is None and not self._gains(base):
            return
        for mode in base.modes:
            if mode == base.settings.checkpointing:
                continue
            way = dataclasses.replace(base.settings, checkpointing=mode)
            if way not in self._curves and self._out_of_time(bool(self._options())):
                return
            measured = self._curve(way, [size for size in self._sizes() if 2 * size >= largest])
            if measured.fitting and measured.stopped != curve.MEMORY:
                return  # memory is no longer what limits

    @staticmethod
    def _gains(base: Curve) -> bool:
        """Whether the largest size that fits is clearly faster per sample than about half of it."""
        last = base.fitting[-1]
        half = max(
            (m for m in base.fitting if 2 * m.micro_batch <= last.micro_batch), default=None, key=_size
        )
        if half is None:
            return True
        return _rate(last) > STILL_GAINING * _rate(half)

    def _try_compiled(self, *, required: bool) -> None:
        """Compiling takes long, so only the best few sizes are tried, of the best way so far."""
        chosen = search.choose(self._options())
        way = dataclasses.replace(chosen.settings, compile=True)
        if way not in self._curves and self._out_of_time(has_answer=not required):
            return
        by_time = sorted((o for o in self._options() if o.measured), key=lambda option: option.step_s)
        near = [o.micro_batch for o in by_time if o.settings == chosen.settings][:COMPILED_SIZES]
        if self._question.fixed_micro_batch is None:
            # fused kernels keep less: the next size, which did not fit, may fit
            near += [size for size in self._sizes() if size > max(near, default=0)][:1]
        self._curve(way, list(dict.fromkeys(near)), rises=False)

    def _out_of_time(self, has_answer: bool) -> bool:
        return has_answer and self._runner.seconds_left < MIN_ROUND_S[self._hardware.device]

    def _options(self) -> list[Candidate]:
        found = [
            candidate
            for used in self._used.values()
            for candidate in search.candidates(used, self._effective, self._world_size)
        ]
        fixed = self._question.fixed_micro_batch
        return found if fixed is None else [option for option in found if option.micro_batch == fixed]

    def _answer(self, chosen: Candidate, options: list[Candidate]) -> Plan:
        reason = search.explain(chosen, options, self._used.values())
        if not self._measured_anything:
            reason += " (remembered from earlier measurements; --retune measures again)"
        trials = self._rows()
        if not chosen.measured:
            row = search.interpolated_row(self._used[chosen.settings], chosen, self._effective)
            trials = sorted([*trials, row], key=_order)
        notes = []
        if self._used[chosen.settings].stopped == curve.TIME:
            notes.append(
                f"Time for trials ran out before larger micro-batches were tried; "
                f"tune.max_seconds={2 * self._max_seconds:g} --retune would allow more."
            )
        if chosen.accumulation_steps == 1:
            notes.append("The whole share of each rank is computed at once: no accumulation is needed.")
        return make_plan(
            effective_batch=self._effective,
            world_size=self._world_size,
            micro_batch=chosen.micro_batch,
            reason=reason,
            trials=trials,
            notes=notes,
            **dataclasses.asdict(chosen.settings),
        )

    def _rows(self) -> list[Trial]:
        rows = [
            row
            for used in self._used.values()
            for row in search.trial_rows(used, self._effective, self._world_size)
        ]
        return sorted(rows, key=_order)

    def _refuse(self) -> None:
        """Say why there is no plan.

        Raises:
            DoesNotFitError: memory; names what was tried and what to type next.
            WorkerError: all sizes crashed or gave wrong results.
        """
        compiled = self._question.base.compile
        asked = [used for way, used in self._used.items() if way.compile == compiled]
        tried = [m for used in asked for m in used.measurements]
        refused = [m for m in tried if m.outcome == DOES_NOT_FIT]
        if not refused:
            first = next((m for m in tried if m.outcome == FAILED), None)
            text = f"micro-batch {first.micro_batch}: {first.error}" if first else "no trial gave an answer"
            raise WorkerError(
                f"no micro-batch could be computed. {text} Correct it, or set batch.micro to try one size."
            )
        smallest = min(refused, key=_size)
        free = memory_text(memory_per_rank(self._hardware, self._local_ranks))
        ways = "; ".join(settings.describe(way) for way in self._used)
        peak = f" (peak {memory_text(smallest.peak_memory_bytes)})" if smallest.peak_memory_bytes else ""
        raise DoesNotFitError(
            f"the model does not fit at micro-batch {smallest.micro_batch}{peak}: {free} were free "
            f"per rank, of which tune.memory_fraction={self._config.tune.memory_fraction:g} may be "
            f"used. Tried: {ways}. {smallest.error or ''} Use {', or '.join(self._advice())}."
        )

    def _advice(self) -> list[str]:
        tried = {way.checkpointing for way in self._used}
        modes: Mapping[str, None] = dict.fromkeys(m for used in self._used.values() for m in used.modes)
        advice = ["checkpointing=full"] if "full" in modes and "full" not in tried else []
        fixed = self._question.fixed_micro_batch
        if fixed is not None and fixed > 1:
            advice.append("batch.micro=auto")
        if self._question.base.precision == "fp32" and self._hardware.device == "cuda":
            advice.append("precision=bf16")
        return [*advice, "smaller samples (a shorter context, a lower resolution)", "a smaller model"]


def _size(measurement: curve.Measurement) -> int:
    return measurement.micro_batch


def _rate(measurement: curve.Measurement) -> float:
    return measurement.micro_batch / (measurement.micro_step_s or float("inf"))


def _order(row: Trial) -> tuple[bool, int, int]:
    return row.compile, ("none", "selective", "full").index(row.checkpointing), row.micro_batch
