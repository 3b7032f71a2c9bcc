"""From a config to a plan: what must be measured, in which order, and what the answer is.

The order: without checkpointing and uncompiled first, then the other modes of checkpointing if memory keeps
a larger micro-batch from being tried while larger ones were still gaining, then the best few sizes compiled
(compilation takes long: it is never tried along a whole curve).
A curve that the cache holds is not measured again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gatrain import batch
from gatrain.config import RunConfig
from gatrain.errors import GatrainError, Interrupted
from gatrain.launch.nodes import Nodes
from gatrain.plan import FAILED, FITS, Plan, StepSettings
from gatrain.tune import answer, cache, confirm, curve, refusal, search
from gatrain.tune.answer import Decision
from gatrain.tune.confirm import Confirmation, WholeSteps
from gatrain.tune.curve import Curve
from gatrain.tune.estimate import DataInfo, memory_per_rank, state_bytes
from gatrain.tune.hardware import Hardware
from gatrain.tune.rounds import Launch, Progress, Run, TrialRunner
from gatrain.tune.search import Candidate
from gatrain.tune.settings import Question
from gatrain.tune.spec import WholeSpec

MAX_SECONDS = {"cpu": 30.0, "cuda": 120.0}
"""Time for trials where ``tune.max_seconds`` is null."""
STILL_GAINING = 1.05
"""A last doubling that gained more than this says that larger micro-batches could be faster still."""
COMPILED_SIZES = 2
MIN_ROUND_S = {"cpu": 5.0, "cuda": 15.0}
"""Seconds that must be left to start another set of processes."""
MAX_ENGINES_BESIDE = confirm.MAX_FINALISTS
"""Further models with their optimizers that the processes of a confirmation may hold."""


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
        self._share = batch.largest_share(self._effective, self._world_size)
        self._key = cache.fingerprint(config, info, hardware, self._world_size, cwd)
        self._curves: dict[StepSettings, Curve] = {} if retune else cache.load_curves(self._key)
        self._confirmations = [] if retune else cache.load_confirmations(self._key)
        self._free_bytes = memory_per_rank(hardware, nodes.nproc)
        self._overlaps = hardware.device == "cuda" and self._world_size > 1 and question.tries_overlap
        self._in_place: set[StepSettings] = set()
        self._fixed = question.fixed_micro_batch
        self._parameter_bytes = info.parameter_bytes
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
        compiles = self._question.tries_compile or explores
        base = self._curve(first, self._sizes(), is_last=not compiles)
        if self._question.tries_checkpointing:
            self._try_checkpointing(base)
        if compiles and self._options():
            self._try_compiled(required=explores)
        elif explores:
            self._curve(asked, self._sizes())  # fused kernels may fit where the plain ones do not
        options = [option for option in self._options() if option.settings.compile or not asked.compile]
        if not options:
            refusal.refuse(self._used, self._question, self._config, self._hardware.device, self._free_bytes)
        return self._answer(self._decide(options))

    def _sizes(self) -> list[int]:
        fixed = self._question.fixed_micro_batch
        return search.candidate_sizes(self._share) if fixed is None else [fixed]

    def _curve(
        self, way: StepSettings, sizes: list[int], *, rises: bool = True, is_last: bool = True
    ) -> Curve:
        """The curve for one way of computing, from the cache if it can answer, with wrong results refused.

        Args:
            is_last: no other way will be measured, so that its finalists can be timed in the same processes.
        """
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
            allowed = self._free_bytes * self._config.tune.memory_fraction
            self._used[way] = search.reject_wrong_losses(known.within(int(allowed)))
        else:
            missing = self._missing(known, sizes)
            self._measured_anything = True
            whole = self._whole_spec(way, is_last=is_last)
            _, confirmation = self._runner.measure(way, missing, rises=rises and fixed is None, whole=whole)
            self._keep_confirmation(confirmation)
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
        self._store()

    def _keep_confirmation(self, confirmation: Confirmation | None) -> None:
        if confirmation is not None:
            self._confirmations.append(confirmation)
            self._store()

    def _store(self) -> None:
        trouble = cache.store_curves(self._key, self._curves, self._confirmations)
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
            sizes = [size for size in self._sizes() if 2 * size >= largest]
            measured = self._curve(way, sizes, is_last=not self._question.tries_compile)
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

    def _decide(self, options: list[Candidate]) -> Decision:
        """Choose by the model and, where that is a close call, by whole steps. Pure but for those trials."""
        near = confirm.finalists(options)
        overlapping = self._overlapping(near[0])
        named = {option.key: option for option in (*near, *overlapping)}
        timed = self._known_whole_steps(list(named.values()))
        if timed is None and len(named) > 1 and self._measured_anything and self._fixed is None:
            self._confirm(list(named.values()))
            timed = self._known_whole_steps(list(named.values()))
        if timed is not None:
            if (verdict := confirm.verdict(timed)) is not None:
                return Decision(verdict.chosen, options, verdict, timed)
            failed = {option.key for option, steps in timed if steps.error}
            options = [option for option in options if option.key not in failed] or options
        return Decision(search.choose(options), options, timed=timed or [], is_close=len(near) > 1)

    def _overlapping(self, best: Candidate) -> list[Candidate]:
        """The best candidate with the other way of reducing: on several GPUs only whole steps can compare."""
        if not self._overlaps:
            return []
        return [dataclasses.replace(best, settings=dataclasses.replace(best.settings, sync="overlap"))]

    def _known_whole_steps(self, near: list[Candidate]) -> list[tuple[Candidate, WholeSteps]] | None:
        """What an interleaved run says of these candidates, the newest that has the best and another."""
        named = [confirm.finalist_of(o, self._effective, self._world_size) for o in near]
        for run in reversed(self._confirmations):
            if (run.effective_batch, run.world_size) != (self._effective, self._world_size):
                continue
            found = [
                (o, steps) for o, f in zip(near, named, strict=True) if (steps := run.get(f)) is not None
            ]
            if len(found) > 1 and run.get(named[0]) is not None:
                return found
        return None

    def _confirm(self, near: list[Candidate]) -> None:
        """Time whole steps of these candidates in trial processes of their own, if time and memory allow."""
        if near[0].settings in self._in_place and len({option.settings for option in near}) == 1:
            return  # the processes that measured the curve have tried already
        near = [option for option in near if self._fits_beside(option, near[0])]
        seconds = self._whole_seconds()
        count, _ = confirm.affordable([option.step_s for option in near], seconds)
        if count < 2 or self._out_of_time(has_answer=True):
            return
        asked = WholeSpec(
            self._effective,
            self._world_size,
            seconds,
            tuple(confirm.finalist_of(o, self._effective, self._world_size) for o in near[:count]),
        )
        try:
            _, confirmation = self._runner.measure(near[0].settings, (), whole=asked)
        except Interrupted:
            raise
        except GatrainError as error:  # the modelled choice stands
            self._progress(f"the finalists could not be timed as whole steps: {error}")
            return
        self._keep_confirmation(confirmation)

    def _fits_beside(self, option: Candidate, best: Candidate) -> bool:
        """Whether the engines of both can be in memory at once; each further way has one of its own."""
        if option.settings == best.settings:
            return True
        largest = max(self._curve_of(each).peak_bytes(each.micro_batch) or 0 for each in (option, best))
        budget = self._free_bytes * self._config.tune.memory_fraction
        others = MAX_ENGINES_BESIDE * state_bytes(self._config, self._parameter_bytes)
        return largest + others <= budget

    def _whole_spec(self, way: StepSettings, *, is_last: bool) -> WholeSpec | None:
        """Whole steps in the processes that measure a curve: they are warm, and a new start takes seconds."""
        if not is_last or self._fixed is not None or self._overlaps:
            return None
        self._in_place.add(way)
        others = [option.step_s for option in self._options() if option.settings != way]
        known = self._curves.get(way)
        return WholeSpec(
            self._effective,
            self._world_size,
            self._whole_seconds(),
            known=known.measurements if known is not None else (),
            rival_s=min(others, default=None),
        )

    def _whole_seconds(self) -> float:
        return min(confirm.MAX_SECONDS[self._hardware.device], max(0.0, self._runner.seconds_left))

    def _curve_of(self, option: Candidate) -> Curve:
        """The curve behind a candidate, also where it differs in the way of reducing."""
        return self._used[dataclasses.replace(option.settings, sync=self._question.base.sync)]

    def _answer(self, decision: Decision) -> Plan:
        return answer.make(
            decision,
            self._used,
            self._curve_of(decision.chosen),
            effective_batch=self._effective,
            world_size=self._world_size,
            config=self._config,
            on_gpu=self._hardware.device == "cuda",
            is_remembered=not self._measured_anything,
            max_seconds=self._max_seconds,
            allowed_bytes=int(self._free_bytes * self._config.tune.memory_fraction),
        )


def _size(measurement: curve.Measurement) -> int:
    return measurement.micro_batch


def _rate(measurement: curve.Measurement) -> float:
    return measurement.micro_batch / (measurement.micro_step_s or float("inf"))
