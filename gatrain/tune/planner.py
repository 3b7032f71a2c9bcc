"""From a config to a plan: what must be measured, in which order, and what the answer is.

The order: without checkpointing and uncompiled first, then a few of the best sizes compiled (compilation takes
long: it is never tried along a whole curve), then the other modes of checkpointing if memory keeps a larger
micro-batch from being tried while larger ones were still gaining. All in the same warm processes.
A curve that the cache holds is not measured again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from gatrain import batch, units
from gatrain.errors import ExactnessError, GatrainError, Interrupted
from gatrain.inspected import Inspected
from gatrain.plan import FAILED, FITS, SKIPPED, Measurement, Plan, StepSettings
from gatrain.tune import curve, explain, finalists, judging, knobs, memory_model, protocol, refusal, search
from gatrain.tune.cache import Known
from gatrain.tune.curve import Curve
from gatrain.tune.explain import Decision
from gatrain.tune.finalists import Confirmation, StepTimings
from gatrain.tune.knobs import Row, SearchSpace
from gatrain.tune.protocol import FullStepSpec
from gatrain.tune.runner import Progress, Run, TrialRunner, sentence
from gatrain.tune.search import Candidate
from gatrain.tune.stages import with_stages

WORTH_RECOMPUTING = {"none": 0.0, "selective": 1.06, "every_2": 1.1, "full": 1.15}
"""A last doubling of the micro-batch that gained this factor says that larger ones may gain more than recomputation
costs: 2 to 10 % selective and 15 to 30 % full, on an H100 (every second block: half of that); further doublings
gain less and less. Other modes are not tried; ``offload`` only where it is asked for, since trials compare losses
and its streams have not been measured on a GPU yet."""
MIN_ROUND_S = {"cpu": 5.0, "cuda": 15.0}
"""Seconds that must be left to begin with another way of computing."""
MIN_SIZE_S = 2.0
MAX_COMPILE_S = 15.0
"""Seconds of compilation, at most, that timing the finalists as full steps is worth."""
NOT_OVERLAPPED = (
    "The overlapped reduction was not compared: memory does not hold both ways beside each other at this "
    "micro-batch. sync=overlap takes it anyway."
)
MAX_PROMISING = 3
"""Sizes, at most, that are measured because the line between others promises something of them."""
MAX_FLAT = 2
"""Compiled sizes in a row without a gain that end the climb: one alone may be noise."""
CLEARLY_SLOWER = 0.03
"""Part by which a larger compiled size must be slower per sample to end the climb at once."""
STEP_UP = 1.15
"""Factor above the largest compiled size that fits from which one more, below what does not, is worth compiling."""
HOST_SHARE = 0.5
"""Part of a compiled micro-step in which the host hands it over, from which CUDA graphs are worth trials."""
MAX_ENGINES_BESIDE = finalists.MAX_FINALISTS
"""Further models with their optimizers that the processes of a confirmation may hold."""


class Planner:
    """One question, answered from the cache and from trials."""

    def __init__(
        self,
        space: SearchSpace,
        found: Inspected,
        known: Known,
        run: Run,
        *,
        keep: Callable[[Known], None],
        progress: Progress,
        shared: Path | None = None,
        config_yaml: str | None = None,
    ) -> None:
        self._space = space = knobs.for_model(space, found)
        self._split = space.split
        self._fixed = space.fixed_micro_batch
        self._progress = progress
        self._runner = TrialRunner(
            space.config, run, space.max_seconds, self._keep, progress, shared, config_yaml
        )
        self._keep_known = keep
        self._known = known
        self._curves = {curve.settings: curve for curve in known.curves}
        self._found = found
        self._equal_steps = found.synchronises and space.split.world_size > 1
        self._fresh: set[StepSettings] = set()  # measured now
        self._used: dict[StepSettings, Curve] = {}
        self._measured_anything = False
        self._loss_remarks: dict[StepSettings, str] = {}

    def plan(self) -> Plan:
        """Take what was asked for, or measure what is missing and choose.

        Raises:
            DoesNotFitError: not even the smallest size fits.
            WorkerError: every size failed for another reason.
        """
        space, config, chosen_curve = self._space, self._space.config, None
        if self._fixed is not None and not space.needs_trials:
            reason = f"batch.micro={self._fixed} was asked for; {space.precision_reason}"
            plan = Plan(split=space.split, micro_batch=self._fixed, settings=space.base, reason=reason)
        else:
            decision = self._search()
            chosen_curve = self._curve_of(decision.chosen)
            plan = explain.make(
                decision, self._used, chosen_curve, space, is_remembered=not self._measured_anything
            )
        plan = explain.with_notes(plan, self._found, config)
        stages, equal_steps = config.batch.stages, self._equal_steps
        return with_stages(plan, stages, curve=chosen_curve, fixed=self._fixed, equal_steps=equal_steps)

    def _search(self) -> Decision:
        asked = self._space.base
        # Each size compiles for long, so even where compilation is asked for the curve is found without it.
        explores = bool(asked.compile) and self._fixed is None
        first = dataclasses.replace(asked, compile=False) if explores else asked
        for settings in dict.fromkeys((first, asked)):
            if settings == first or not self._measured():  # fused kernels may fit where the plain ones do not
                self._curve(settings, self._space.sizes)
        base = self._used[first]
        rows = [*self._space.open, *([knobs.COMPILE] if explores else [])]
        self._explore(sorted({*rows}, key=knobs.ROWS.index), base, required=explores)
        self._explore([knobs.row_of(offer) for offer in base.knobs], base)
        self._measure_promising()
        options = [option for option in self._allowed() if option.measured]
        if options:
            return self._decide(options)
        raise refusal.why(self._used, self._space)

    def _allowed(self) -> list[Candidate]:
        """The candidates that may be chosen: uncompiled ones only lead the way where compilation is asked for."""
        asked = self._space.base.compile
        return [option for option in self._options() if not asked or option.settings.compile == asked]

    def _measure_promising(self) -> None:
        """A size is chosen only if it was measured. One between measured sizes, or below the compiled ones, that
        promises more than the best of these is measured now; also for another effective batch than the cache's."""
        for _ in range(MAX_PROMISING):
            options = self._allowed()
            best = min((option.step_s for option in options if option.measured), default=float("inf"))

            def promises(option: Candidate, best: float = best) -> bool:
                is_between = self._measured_anything and not self._is_estimate(option)
                return option.step_s < best * (1 - (search.NOISE if is_between else curve.WORTH_TRIALS))

            promising = [option for option in options if not option.measured and promises(option)]
            if self._fixed is not None or not promising:
                return
            option = min(promising, key=lambda each: each.step_s)
            compile_s = max((m.compile_s or 0.0 for m in self._curve_of(option).fitting), default=0.0)
            needed_s = MIN_SIZE_S + (compile_s if option.settings.compile else 0.0)
            if math.isfinite(best) and self._runner.seconds_left < needed_s:
                return
            self._measure(option.settings, [option.micro_batch], stop_early=False)

    def _is_estimate(self, option: Candidate) -> bool:
        """Whether only the uncompiled curve tells of this size."""
        fitting = self._used[option.settings].fitting
        return not fitting or option.micro_batch < fitting[0].micro_batch

    def _curve(self, settings: StepSettings, sizes: list[int]) -> Curve:
        """The curve for one way of computing over rising sizes, from the cache if it can answer."""
        known = self._curves.get(settings)
        if known is None:
            answered = False
        elif self._fixed is not None:
            answered = self._fixed in {m.micro_batch for m in known.fitting}
        else:
            answered = known.answers(sizes, self._space.max_seconds)
        if not answered:
            self._measure(settings, self._missing(known, sizes), stop_early=self._fixed is None)
        return self._judged(settings)

    def _measure(self, settings: StepSettings, sizes: list[int], *, stop_early: bool) -> Curve:
        self._measured_anything = True
        self._fresh.add(settings)
        self._runner.measure(settings, sizes, stop_early=stop_early)
        return self._judged(settings)

    def _judged(self, settings: StepSettings) -> Curve:
        """The curve with wrong results refused, and what does not fit any more if it is an old one."""
        found, space = self._curves[settings], self._space
        limit_bytes = None if settings in self._fresh else space.allowed_bytes
        judged, remark = judging.judged(found, limit_bytes, refuses=space.checks_loss)
        if remark is not None:
            self._loss_remarks[settings] = remark
        self._used[settings] = judged
        return judged

    @staticmethod
    def _missing(known: Curve | None, sizes: list[int]) -> list[int]:
        """Sizes to measure now: all but those known to fit or fail; never none."""
        done = {m.micro_batch for m in known.measurements if m.outcome in (FITS, FAILED)} if known else set()
        return [size for size in sizes if size not in done] or sizes

    def _keep(self, measured: Curve) -> None:
        """Merge with what the cache knew, and store at once: also on Ctrl-C."""
        known = self._curves.get(measured.settings)
        if known is not None and self._fixed is not None:
            # one size more says nothing about why the curve ended
            measured = dataclasses.replace(measured, stopped=known.stopped, max_seconds=known.max_seconds)
        elif known is not None and known.stopped != curve.INTERRUPTED and measured.largest < known.largest:
            # a smaller size lifts no limit
            measured = dataclasses.replace(measured, stopped=known.stopped, max_seconds=known.max_seconds)
        self._curves[measured.settings] = known.with_new(measured) if known else measured
        self._store()

    def _keep_confirmation(self, confirmation: Confirmation | None) -> None:
        if confirmation is not None:
            self._known.confirmations.append(confirmation)
            self._store()

    def _store(self) -> None:
        self._known.curves = list(self._curves.values())
        self._keep_known(self._known)

    def _explore(self, rows: Sequence[Row], base: Curve, *, required: bool = False) -> None:
        """Try the values of the rows in turn, each from the best settings so far.

        Args:
            base: the curve that was measured first.
            required: compile, however little time is left.
        """
        waiting: list[Row] = []
        for row in rows:
            if row.explored == knobs.WHERE_MEMORY_LIMITS:
                self._try_against_memory(row, base)
            elif row.explored == knobs.FEW_SIZES and self._measured():
                self._try_few_sizes(row, required=required)
            elif row.explored == knobs.FEW_SIZES:
                waiting.append(row)  # nothing fits yet
        for row in waiting:
            if self._measured():
                self._try_few_sizes(row, required=required)

    def _try_against_memory(self, row: Row, base: Curve) -> None:
        """Recomputation costs time, so it can only win where memory forbids a size that would be faster."""
        options = self._measured()
        limited = self._used[search.choose(options).settings] if options else base
        largest = limited.fitting[-1].micro_batch if limited.fitting else 0
        if limited.stopped != curve.MEMORY or largest >= self._split.share:
            return
        gain = self._gain(limited, base) if limited.fitting and self._fixed is None else float("inf")
        for value in limited.modes:
            if value not in WORTH_RECOMPUTING or value == row.of(limited.settings):
                continue
            if gain < WORTH_RECOMPUTING[value]:
                continue
            settings = row.set(limited.settings, value)
            if settings not in self._curves and self._out_of_time(bool(options)):
                return
            sizes = [size for size in self._space.sizes if 2 * size >= largest]
            if settings.compile:
                self._climb(settings, next((size for size in sizes if size > largest), largest), limited)
                measured = self._used[settings]
            else:
                measured = self._curve(settings, sizes)
            if measured.fitting and measured.stopped != curve.MEMORY:
                return  # memory is no longer what limits

    @staticmethod
    def _gain(*curves: Curve) -> float:
        """Factor by which twice the micro-batch was faster per sample at the end of the first curve that tells."""
        for measured in (each for each in curves if each.fitting):
            last = measured.fitting[-1]
            smaller = [m for m in measured.fitting if 1.4 * m.micro_batch <= last.micro_batch]
            if smaller:
                doublings = math.log2(last.micro_batch / smaller[-1].micro_batch)
                return float((_rate(last) / _rate(smaller[-1])) ** (1 / doublings))
        return float("inf")

    def _try_few_sizes(self, row: Row, *, required: bool) -> None:
        """Few sizes are tried of each value, with the best settings so far: from the largest of those that are
        about as fast as the best, since what is faster has less to gain from small ones."""
        for value in row.values[1:]:
            options = [option for option in self._allowed() if option.measured] or self._measured()
            chosen = search.choose(options)
            near = [
                option.micro_batch
                for option in options
                if option.settings == chosen.settings
                and option.step_s <= (1 + finalists.FINALIST_WITHIN) * chosen.step_s
            ]
            settings = row.set(chosen.settings, value)
            if row is knobs.COMPILE and not self._may_compile(value, chosen):
                continue
            if settings in self._curves or not self._out_of_time(has_answer=not required):
                self._climb(settings, max(near, default=chosen.micro_batch), self._used[chosen.settings])

    def _may_compile(self, value: bool | str, best: Candidate) -> bool:
        """Whether this is the way that was asked for, or may be faster than the best so far: CUDA graphs where the
        GPU waits for the host in compiled micro-steps."""
        asked = self._space.config.compile
        if asked != "auto" or value is True:
            return asked in (value, "auto")
        if not self._space.may_replay or best.settings.compile is not True:
            return False
        found = next(m for m in self._used[best.settings].fitting if m.micro_batch == best.micro_batch)
        return (found.host_s or 0.0) > HOST_SHARE * (found.micro_step_s or 0.0)

    def _climb(self, settings: StepSettings, start: int, plain: Curve) -> None:
        """Measure a compiled curve: upwards from ``start`` while each size gains, downwards if the first did not.

        Args:
            plain: the curve that suggested ``start``: its shape tells of sizes that are not compiled.
        """
        known = self._curves.get(settings)
        if known is not None and self._covers(known, start, plain):
            self._judged(settings)
            return
        measured = self._measure(settings, [start], stop_early=False)
        if self._fixed is not None or start not in {m.micro_batch for m in measured.fitting}:
            return
        sizes = self._space.sizes
        gains: list[float] = []
        best, flat = start, 0
        for size in [each for each in sizes if each > start]:
            gain = self._gain_of(settings, size, best)
            if gain is None:
                if self._used[settings].stopped == curve.MEMORY and not (gains and gains[-1] < -search.NOISE):
                    self._below_refused(settings, size, best)
                break
            gains.append(gain)
            best, flat = (size, 0) if gain >= search.NOISE else (best, flat + 1)
            if (
                flat == MAX_FLAT
                or gain < -CLEARLY_SLOWER
                or (flat and self._compile_s(settings) > MAX_COMPILE_S)
            ):
                break
        if gains and gains[0] < -search.NOISE and best == start:  # larger is slower, so smaller may be faster
            for size in [each for each in reversed(sizes) if each < start]:
                gain = self._gain_of(settings, size, best)
                if gain is None or gain < search.NOISE:
                    break
                best = size

    def _below_refused(self, settings: StepSettings, refused: int, best: int) -> None:
        """One size more between the largest that fits and one that does not: the largest cut of the share that the
        memory line lets hope for."""
        known = self._used[settings]
        if self._compile_s(settings) > MAX_COMPILE_S:
            return
        cuts = {batch.even_size(self._split.share, -(-self._split.share // k)) for k in range(1, 65)}
        lowest = STEP_UP * known.fitting[-1].micro_batch
        budget = known.budget_bytes or self._space.free_bytes
        for size in sorted(cuts, reverse=True):
            if lowest <= size < refused and self._predicted_peak(settings, size) <= budget:
                self._gain_of(settings, size, best)
                return

    def _compile_s(self, settings: StepSettings) -> float:
        return max((m.compile_s or 0.0 for m in self._used[settings].fitting), default=0.0)

    def _predicted_peak(self, settings: StepSettings, size: int) -> float:
        """Peak bytes at ``size``, from the nearest size that fits: what is not state grows with the samples."""
        near = min(self._used[settings].fitting, key=lambda m: abs(m.micro_batch - size))
        state = self._space.state_bytes
        return state + ((near.peak_memory_bytes or 0) - state) * size / near.micro_batch

    def _gain_of(self, settings: StepSettings, size: int, best: int) -> float | None:
        """Measure one size more: the part by which it is faster per sample than ``best``; None where it does not
        fit or there is no time."""
        known = self._used[settings]
        needed_s = self._compile_s(settings) + MIN_SIZE_S
        if self._runner.seconds_left < needed_s:
            self._skip(settings, size, curve.TIME, protocol.no_time(needed_s, self._runner.seconds_left))
            return None
        peak = self._predicted_peak(settings, size)
        over = peak - (known.budget_bytes or self._space.free_bytes)
        if over > memory_model.STEP_ERROR * peak:
            text = f"its predicted peak is {units.size(over)} above what may be used"
            self._skip(settings, size, curve.MEMORY, text)
            return None
        found = {m.micro_batch: m for m in self._measure(settings, [size], stop_early=False).fitting}
        return _rate(found[size]) / _rate(found[best]) - 1 if size in found else None

    def _skip(self, settings: StepSettings, size: int, why: str, text: str) -> None:
        known = self._curves[settings]
        refused = Measurement(size, SKIPPED, error=text)
        skipped = Curve(settings, (refused,), why, self._space.max_seconds, known.modes, known.knobs)
        self._keep(skipped)
        self._progress(sentence(skipped.measurements[0]))
        self._judged(settings)

    @staticmethod
    def _covers(known: Curve, start: int, plain: Curve) -> bool:
        """Whether a curve of a few chosen sizes says enough about ``start``, the size that matters most: measured
        on both sides, or smaller than all, where the plain curve tells how time falls (`search.extended`)."""
        if known.stopped == curve.INTERRUPTED or not known.measurements:
            return False
        is_estimated = known.settings.compile and not known.settings.knobs and bool(plain.fitting)
        is_below = is_estimated and plain.fitting[0].micro_batch <= start
        is_above = start <= known.largest or known.stopped != curve.SHARE
        return is_above and (is_below or known.measurements[0].micro_batch <= start)

    def _out_of_time(self, has_answer: bool) -> bool:
        return has_answer and self._runner.seconds_left < MIN_ROUND_S[self._space.device]

    def _options(self) -> list[Candidate]:
        return [
            option
            for settings in self._used
            for option in search.candidates(self._extended(settings), self._split, self._fixed)
            if not self._equal_steps or option.split.has_equal_steps(option.micro_batch)
        ]

    def _measured(self) -> list[Candidate]:
        return [option for option in self._options() if option.measured]

    def _decide(self, options: list[Candidate]) -> Decision:
        """Choose by the model and, where that is a close call, by full steps. Pure but for those trials."""
        near = finalists.finalists(options)
        overlapping = self._overlapping(near[0])
        remarks = [*self._runner.notices, *dict.fromkeys(self._loss_remarks.values())]
        remarks += [NOT_OVERLAPPED] if self._space.overlaps and not overlapping else []
        named = {option.key: option for option in (*near, *overlapping)}
        timed = self._known_full_steps(list(named.values()))
        if timed is None and len(named) > 1 and self._measured_anything and self._fixed is None:
            self._confirm(list(named.values()))
            timed = self._known_full_steps(list(named.values()))
        if timed is not None:
            if (verdict := finalists.verdict(timed)) is not None:
                return Decision(verdict.chosen, options, verdict, timed, remarks=remarks)
            failed = {option.key for option, steps in timed if steps.error}
            options = [option for option in options if option.key not in failed] or options
        chosen = search.choose(options)
        return Decision(chosen, options, timed=timed or [], remarks=remarks, is_close=len(near) > 1)

    def _overlapping(self, best: Candidate) -> list[Candidate]:
        """The best candidate with the other way of reducing: on several GPUs only full steps can compare."""
        if not self._space.overlaps:
            return []
        other = dataclasses.replace(best, settings=knobs.SYNC.set(best.settings, "overlap"))
        return [other] if self._fits_beside(other, best) else []

    def _known_full_steps(self, near: list[Candidate]) -> list[tuple[Candidate, StepTimings]] | None:
        """What an interleaved run says of these candidates, the newest that has the best and another."""
        named = [finalists.finalist_of(o) for o in near]
        for run in reversed(self._known.confirmations):
            found = [
                (o, steps) for o, f in zip(near, named, strict=True) if (steps := run.get(f)) is not None
            ]
            if len(found) > 1 and run.get(named[0]) is not None:
                return found
        return None

    def _confirm(self, near: list[Candidate]) -> None:
        """Time full steps of these candidates in the warm trial processes, if time and memory allow."""
        near = self._affordable([option for option in near if self._fits_beside(option, near[0])])
        seconds = min(finalists.MAX_SECONDS[self._space.device], max(0.0, self._runner.seconds_left))
        count, _ = finalists.affordable([option.step_s for option in near], seconds)
        if count < 2:
            return
        asked = FullStepSpec(
            seconds,
            tuple(finalists.finalist_of(o) for o in near[:count]),
        )
        try:
            _, confirmation = self._runner.measure(near[0].settings, (), full_steps=asked)
        except (Interrupted, ExactnessError):
            raise
        except GatrainError as error:  # the modelled choice stands
            self._progress(f"the finalists could not be timed as full steps: {error}")
            return
        self._keep_confirmation(confirmation)

    def _affordable(self, near: list[Candidate]) -> list[Candidate]:
        """Leave out what would first compile for longer than the answer is worth; the best stays."""
        left_s = min(MAX_COMPILE_S, self._runner.seconds_left - MIN_SIZE_S)
        kept = []
        for option in near:
            known = self._curve_of(option)
            done = {m.micro_batch for m in known.fitting if not m.is_estimate}
            needed = option.split.distinct_sizes(option.micro_batch)
            cost_s = len(needed - done) * max((m.compile_s or 0.0 for m in known.fitting), default=0.0)
            if not option.settings.compile or cost_s <= left_s:
                left_s -= cost_s if option.settings.compile else 0.0
                kept.append(option)
        return kept

    def _fits_beside(self, option: Candidate, best: Candidate) -> bool:
        """Whether the engines of both can be in memory at once; each further way has one of its own."""
        if option.settings == best.settings:
            return True
        ways = {(each.settings.compile, each.settings.knob_text) for each in (option, best)}
        if option.settings.compile and best.settings.compile and len(ways) > 1:
            return False  # compiled code is kept by the function: one might run with the other's
        curves = [self._curve_of(each) for each in (option, best)]
        largest = max(c.peak_bytes(o.micro_batch) or 0 for c, o in zip(curves, (option, best), strict=True))
        largest += max((m.fragmentation_bytes for c in curves for m in c.fitting), default=0)
        budget = self._space.allowed_bytes
        others = MAX_ENGINES_BESIDE * self._space.state_bytes
        return largest + others <= budget

    def _curve_of(self, option: Candidate) -> Curve:
        """The curve behind a candidate, also where it differs in the way of reducing."""
        return self._extended(dataclasses.replace(option.settings, sync=self._space.base.sync))

    def _extended(self, settings: StepSettings) -> Curve:
        """What was measured in one way, and what that says of smaller sizes."""
        plain = self._used.get(dataclasses.replace(settings, compile=False))
        used = self._used[settings]
        return search.extended(used, plain) if settings.compile and plain is not None else used


def _rate(measurement: Measurement) -> float:
    return measurement.micro_batch / (measurement.micro_step_s or float("inf"))
