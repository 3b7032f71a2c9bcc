"""The training loop: windows in order, one step each, metrics once per interval, saved states on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatrain.config import RunConfig
from gatrain.errors import DataError, ExactnessError
from gatrain.plan import Plan
from gatrain.rundir import RunDir
from gatrain.train.aftermath import Aftermath
from gatrain.train.engine import Engine
from gatrain.train.evaluate import EvaluationError, EvaluationStopped, evaluate
from gatrain.train.events import Sink
from gatrain.train.hook import TrainedStep
from gatrain.train.hooks import Hooks
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.nonfinite_policy import NonFinitePolicy, remedies
from gatrain.train.notices import Notices
from gatrain.train.ranks import Ranks
from gatrain.train.records import RunSummary, StepRecord
from gatrain.train.run_folder import RunFolder
from gatrain.train.saved_state import Progress
from gatrain.train.state_saver import StateSaver
from gatrain.train.step_metrics import NOT_FINITE, PendingStep, StepMetrics
from gatrain.train.stream_loader import ranks_read_the_same
from gatrain.train.window_result import WindowResult
from gatrain.train.window_source import open_windows
from gatrain.train.windows import MOST_EXACT_PAIRS, Cut, WindowSchedule

MOST_PENDING = 256
"""Steps whose metrics may wait on the device: each keeps some ten kB, whatever train.log_every says."""
MOST_SKIPPED_AT_END = 50
"""A run whose last steps were all skipped is not called completed: from this many on."""


@dataclass
class Trainer:
    """One run on this rank, from ``progress`` to ``total_steps``. All ranks call its methods together.

    ``sinks`` hears of it on rank 0; ``stop_requested`` may turn true on any rank, and then all stop after the
    window in hand. What fails beside the training itself is left to ``aftermath``.
    """

    engine: Engine
    config: RunConfig
    plan: Plan
    schedule: WindowSchedule
    total_steps: int
    progress: Progress
    run_dir: RunDir
    sinks: Sink
    stop_requested: Callable[[], bool]
    aftermath: Aftermath
    pause_requested: Callable[[], bool] = lambda: False
    """May turn true on any rank; then all `pause` after the window in hand."""
    pause: Callable[[], None] = lambda: None
    run_folder: RunFolder | None = None
    """On rank 0."""
    cuts: Sequence[Cut] = ()
    """How windows are cut, by stage, where the effective batch changes."""
    hooks: Hooks = field(default_factory=lambda: Hooks({}, Ranks()))
    evaluation_is_missing: bool = False
    """The run goes on at a step whose evaluation was cut short, or never begun."""
    _evaluation: dict[str, Any] = field(default_factory=dict)
    _evaluated_step: int = -1
    _last_loss: float | None = None
    _last_skipped: str = ""
    _stage: int | None = None
    """Of the window in hand, where the effective batch has several; None before the first."""

    def __post_init__(self) -> None:
        self._metrics = StepMetrics(self.engine)
        self._notices = Notices(
            self.sinks.notice,
            self.schedule.full_at,
            self.run_dir.metrics.name,
            has_stages=self.schedule.stages is not None,
            clip_norm=self.config.optimizer.clip_norm,
        )
        self._saver = StateSaver(
            self.engine,
            self.config,
            self.run_dir,
            self.sinks,
            self.run_folder,
            self.hooks,
            self.progress.step,
        )
        self._nonfinite = NonFinitePolicy(self.engine, self.config, self._window_again)

    def run(self) -> RunSummary:
        """Train, save, evaluate; return how it ended.

        Raises:
            ExactnessError: weights differ from their counts, or a gradient is not finite.
            SavedStateError: the final state could not be written.
        """
        began = time.perf_counter()
        try:
            stopped = self._train()
            self.hooks.settle()
        except Exception as error:
            self._save_what_was_trained(error)
            raise
        self._flush()
        self._saver.save_last(self.progress)  # before anything else of the user's runs
        is_done = self.hooks.ended or self.progress.step >= self.total_steps
        if is_done:
            self._refuse_what_learnt_nothing()
        stopped = stopped or not (self._evaluated_step == self.progress.step or self._evaluate())
        completed = not stopped and is_done
        findings = self.hooks.findings() if self.engine.ranks.rank == 0 else {}
        self.hooks.end(self.progress.step, completed)
        sample_output = self._sample_output() if completed else None
        return RunSummary(
            status="completed" if completed else "stopped",
            step=self.progress.step,
            total_steps=self.total_steps,
            loss=self._last_loss,
            eval_loss=self._evaluation.get("loss"),
            evaluation=self._evaluation,
            updates=self.progress.updates,
            skipped_steps=self.progress.skipped,
            unreadable_samples=self.progress.unreadable,
            showcase=sample_output,
            elapsed_s=time.perf_counter() - began,
            findings=findings,
            stopped_early=self.hooks.reason()
            if completed and self.progress.step < self.total_steps
            else None,
        )

    def finished_steps(self) -> int:
        """The last step that the device has done, as far as is known without waiting. For any thread."""
        return self._metrics.finished

    def _train(self) -> bool:
        """Run the steps; returns whether a stop was asked for."""
        missing = self.evaluation_is_missing or self.hooks.have_missed_evaluation(self.progress.step)
        if missing and self._evaluates_after(self.progress.step) and not self._evaluate():
            return True
        if self.hooks.ended:
            return False
        meter, log_every = self._metrics.meter, self.config.train.log_every
        previous = meter.mark()
        for loaded in self._windows(self.progress, self.total_steps, self.config.train.data_workers):
            for text in loaded.notices:
                self.sinks.notice(text)
            if (stage := self.schedule.stage_at(loaded.index)) != self._stage:
                self._begin(stage, loaded.index)
            before, lr = self.progress, self.engine.learning_rate(self.progress.updates)
            result, norm = self.engine.step(self._with_requests(loaded), before.updates)
            end = meter.mark()
            scale = self.engine.scaler.now() if self.engine.scaler else None
            done = PendingStep(loaded.index, result, norm, previous, end, before, lr, scale, loaded.skipped)
            done.metrics.update(result.metrics)
            self._metrics.add(done)
            previous = end
            self._check_window(loaded, result)
            self._advance(result, loaded.position)
            del loaded  # its memory may be wanted for the next one
            if self.hooks and self.progress.updates > before.updates:
                done.metrics.update(self.hooks.update(self._trained_step(done)))
            step = self.progress.step
            stop, pauses = result.counts["stop"] > 0, result.counts["pause"] > 0
            self.hooks.ended = self.hooks.ended or result.counts["end"] > 0
            save_due = stop or result.counts["save"] > 0 or _is_due(step, self.config.save.every)
            eval_due = self._evaluates_after(step) and not stop
            log_due = step == 1 or step % log_every == 0 or len(self._metrics) >= MOST_PENDING
            if result.skipped or save_due or eval_due or log_due:
                self._flush()
            if save_due or eval_due or pauses:
                self.hooks.settle()
            if save_due:
                self._saver.save(self.progress)
                # a signal that came while the state was written: it is saved already
                stop = stop or self.engine.ranks.sum([float(self.stop_requested())])[0] > 0
            if eval_due and not stop:
                stop = not self._evaluate()
            if pauses and not stop:
                self.pause()
            if save_due or eval_due or pauses:
                previous = meter.mark()  # pauses are not part of the next step
            if stop or self.hooks.ended:
                return stop
        return False

    def _begin(self, stage: int, index: int) -> None:
        """Set the optimizer to the effective batch from window ``index`` on, and say what changes."""
        scaling, effective = self.engine.scaling, self.schedule.effective_at(index)
        scaling.set_to(effective)
        rule = scaling.words(effective) if self.config.batch.rule != "none" else ""
        if self.plan.stages:
            equation = self.plan.stages[stage].equation
            is_first = index == self.schedule.stage_starts[stage][0]
            begins = f"step {index + 1} begins" if is_first else f"step {index + 1} is in"
            unruled = "" if self._stage is None else "batch.rule=none leaves the learning rate as it is"
            after = rule or unruled
            self.sinks.notice(
                f"{begins} stage {stage + 1} of {len(self.plan.stages)}: {equation}{f'; {after}' if after else ''}"
            )
        elif rule:
            self.sinks.notice(rule)
        self._stage = stage

    # --- windows

    def _evaluates_after(self, step: int) -> bool:
        return _is_due(step, self.config.eval.every) and step < self.total_steps

    def _windows(self, start: Progress, stop: int, workers: int) -> Iterable[LoadedWindow]:
        """This rank's part of the windows from a place in the run to ``stop`` - 1, at least one ahead."""
        return open_windows(
            self.engine.task,
            self.schedule,
            self.engine.ranks,
            micro_batch=self.plan.micro_batch,
            shares=self.plan.split.shares if self.plan.world_size == self.engine.ranks.world_size else None,
            start=start.step,
            stop=stop,
            position=start.stream,
            workers=workers,
            pin_memory=self.engine.device.type == "cuda",
            cuts=self.cuts,
        )

    def _with_requests(self, loaded: LoadedWindow) -> LoadedWindow:
        """The window with what this rank asks of all: it travels with the counts."""
        evaluates = self._evaluates_after(self.progress.step + 1)
        loaded.counts.update(
            stop=self.stop_requested(),
            end=bool(self.hooks.stop_reason),
            pause=self.pause_requested(),
            save=self.engine.ranks.rank == 0 and self._saver.is_wanted(before_evaluation=evaluates),
        )
        return dataclasses.replace(loaded, failure=self.hooks.failure) if self.hooks.failure else loaded

    def _trained_step(self, done: PendingStep) -> TrainedStep:
        return TrainedStep(
            model=self.engine.model,
            step=self.progress.step,
            updates=self.progress.updates,
            lr=done.lr,
            grad_norm=done.norm,
            loss_sums=done.result.local_loss_sums,
            weights=done.result.weight_totals,
            left_out=self.engine.guard.stopped,
        )

    def _window_again(self, start: Progress) -> LoadedWindow:
        """This rank's part of the window after ``start``, read once more."""
        (loaded,) = self._windows(start, start.step + 1, workers=0)
        return loaded

    def _check_window(self, loaded: LoadedWindow, result: WindowResult) -> None:
        """Compare what the micro-batches of all ranks held with the window that the step is for.

        Raises:
            ExactnessError: samples are missing, are there twice, or are others.
        """
        if not ranks_read_the_same(result.counts, self.engine.ranks.world_size):
            raise ExactnessError(
                f"step {loaded.index + 1}: the ranks read other samples at the same places of the stream, so its "
                "update is not saved. Every rank reads the whole stream and takes its part of each window: "
                "leave out what splits it by rank (split_dataset_by_node, split_by_node), and give its shuffle "
                "a seed."
            )
        held = int(result.counts["samples"] + result.counts["dropped"])
        is_other = int(result.counts["digest"]) != loaded.window_digest and held <= MOST_EXACT_PAIRS
        if held != loaded.window_samples or is_other:
            what = "other samples" if held == loaded.window_samples else f"{held} samples"
            raise ExactnessError(
                f"step {loaded.index + 1} computed {what} instead of the {loaded.window_samples} of its window "
                f"(micro_batch={self.plan.micro_batch} over {self.engine.ranks.world_size} ranks). Its update is "
                "not saved. A data set or a collate function that gives more or fewer samples than it was asked "
                "for does this."
            )

    def _advance(self, result: WindowResult, stream: dict[str, Any] | None) -> None:
        before = self.progress
        none_made = result.is_empty or result.skipped
        nonfinite = before.nonfinite_in_row + 1 if result.skipped else before.nonfinite_in_row
        self.progress = dataclasses.replace(
            before,
            step=before.step + 1,
            samples=before.samples + int(result.counts["samples"]),
            tokens=before.tokens + int(result.counts["tokens"]),
            unreadable=before.unreadable + int(result.counts["unreadable"]),
            updates=before.updates + (not none_made),
            skipped=before.skipped + none_made,
            skipped_in_row=before.skipped_in_row + 1 if none_made else 0,
            nonfinite_in_row=nonfinite if none_made else 0,
            stream=stream,
        )

    # --- metrics

    def _flush(self) -> None:
        """Bring the pending steps' metrics to the host and report them. Waits for the device."""
        if not len(self._metrics):
            return
        if self.run_folder is not None:
            self.run_folder.look()
        for step, record in self._metrics.take():
            self._report(step, self.hooks.measured(record))
        self._notices.thawed(self.progress.step, self.engine.newly_thawed())
        for text in self.engine.new_notices():
            self.sinks.notice(f"step {self.progress.step}: {text}")

    def _report(self, step: PendingStep, record: StepRecord) -> None:
        if any(step.index == first for first, _ in self.schedule.stage_starts):
            record = dataclasses.replace(record, effective_batch=self.schedule.effective_at(step.index))
        self.sinks.step(record)
        self._last_skipped = record.skipped or self._last_skipped
        self._notices.unreadable(step, record)
        if record.skipped == NOT_FINITE:
            self._go_on_or_end(step, record)
            return
        if record.loss is not None:
            self._last_loss = record.loss
        if record.grad_norm and not self.progress.moved:
            self.progress = dataclasses.replace(self.progress, moved=True)
        self._notices.window(step, record)

    def _go_on_or_end(self, step: PendingStep, record: StepRecord) -> None:
        """After a window that is not finite.

        Raises:
            ExactnessError: the run ends; what can be saved is the state before that window.
        """
        verdict = self._nonfinite.judge(step, record)
        if verdict.goes_on:
            self.sinks.notice(verdict.text)
            return
        self.progress = dataclasses.replace(step.before, moved=self.progress.moved)
        where = ""
        if verdict.state_is_good and self._saver.save_once(self.progress):
            where = f" The state before it is saved as that of step {self.progress.step}."
        helps = remedies(self.engine, self.config, self.run_dir, step.before.updates).lines(verdict.findings)
        listed = "\nWhat helps:\n" + "\n".join(f"- {line}" for line in helps) if helps else ""
        raise ExactnessError(f"{verdict.text}{where}{listed}")

    # --- ends

    def _save_what_was_trained(self, error: Exception) -> None:
        """After an error: no step is lost to it, whatever save.every says. The error itself is what is told.

        Only where every rank has left the training at the same place, with weights as after the last step.
        """
        in_window = bool(getattr(error, "before_update", False))
        after_step = error in self.hooks.raised
        while_reading = self.engine.ranks.world_size == 1 and isinstance(error, DataError)
        if not (in_window or while_reading or after_step) or self.progress.step == self._saver.saved_step:
            return
        with contextlib.suppress(Exception):
            self.engine.optimizer.zero_grad(set_to_none=True)  # memory may be what is missing
            if in_window and not after_step:
                self.engine.guard.restore_buffers()
            self._flush()
            self._saver.save(self.progress)

    def _refuse_what_learnt_nothing(self) -> None:
        """At the end of a run.

        Raises:
            ExactnessError: no window moved the weights, or none of the last ones did.
        """
        progress = self.progress
        if progress.updates == 0:
            why = f"no update was ever made: all {progress.step} windows were skipped ({self._last_skipped})"
        elif progress.skipped_in_row >= MOST_SKIPPED_AT_END:
            why = f"the last {progress.skipped_in_row} steps made no update ({self._last_skipped})"
        elif not progress.moved:
            why = f"every gradient of all {progress.updates} updates was exactly zero: the weights learnt nothing"
        else:
            return
        raise ExactnessError(f"{why}. Look at the labels and at what the loss depends on.")

    def _evaluate(self) -> bool:
        """Evaluate; False where a stop was asked for meanwhile. An error of it costs this evaluation alone."""
        clock, step = self._saver.clock, self.progress.step
        began, found, is_whole = clock.now(), {}, False
        try:
            found = self._evaluate_weights()
            for name, weights in self.hooks.other_weights() if found else ():
                with self.hooks.in_place(name, weights):
                    found |= {f"{name}.{key}": value for key, value in _numbers(self._evaluate_weights())}
            is_whole = bool(found)
        except EvaluationStopped:
            return False
        except EvaluationError as error:
            self.aftermath.add("the evaluation", str(error), f"after step {step}")
        clock.evaluated(began)
        self._evaluation, self._evaluated_step = found, step
        if found:
            self.sinks.evaluation(step, found)
        if is_whole:
            self.hooks.evaluated(step, found)
            for name in self.hooks.settle():
                self._saver.keep(self.progress, name)
        return True

    def _evaluate_weights(self) -> dict[str, Any]:
        """The numbers of the weights that the model has now. Collective."""
        return evaluate(
            self.engine,
            samples=self.config.eval.samples,
            micro_batch=self.plan.micro_batch,
            workers=self.config.train.data_workers,
            window_samples=self.plan.effective_batch,
            stop_requested=self.stop_requested,
            describe=self.aftermath.describe,
        )

    def _sample_output(self) -> str | None:
        shown = None
        if self.engine.ranks.rank == 0:
            with self.aftermath.guard("the sample output (showcase)"):
                shown = self.engine.showcase()
        return shown


def _numbers(evaluation: dict[str, Any]) -> list[tuple[str, float]]:
    return [(key, value) for key, value in evaluation.items() if isinstance(value, float)]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
