"""The training loop: windows in order, one step each, metrics once per interval, saved states on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatrain import disk
from gatrain.config import RunConfig
from gatrain.errors import DataError, ExactnessError, SavedStateError
from gatrain.plan import Plan
from gatrain.rundir import RunDir
from gatrain.train import nonfinite, saved_state
from gatrain.train.accumulate import WindowResult
from gatrain.train.aftermath import Aftermath
from gatrain.train.engine import Engine
from gatrain.train.evaluate import EvaluationError, EvaluationStopped, evaluate
from gatrain.train.events import Sink
from gatrain.train.loader import WindowLoader
from gatrain.train.meter import Mark, Meter
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.rescue import rescue
from gatrain.train.run_folder import RunFolder
from gatrain.train.save_clock import SaveClock
from gatrain.train.saved_state import Progress
from gatrain.train.windows import MOST_EXACT_PAIRS, WindowSchedule

MOST_PENDING = 256
"""Steps whose metrics may wait on the device: each keeps some ten kB, whatever train.log_every says."""
MOST_SKIPPED_AT_END = 50
"""A run whose last steps were all skipped is not called completed: from this many on."""


@dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the device."""

    index: int
    result: WindowResult
    norm: Tensor
    start: Mark
    end: Mark
    before: Progress
    lr: float
    loss_scale: Tensor | None
    unreadable: Sequence[str]
    """Samples of this rank's part that were skipped, each with the reason."""


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
    evaluation_is_missing: bool = False
    """The run goes on at a step whose evaluation was cut short, or never begun."""
    _pending: list[_Pending] = field(default_factory=list)
    _evaluation: dict[str, Any] = field(default_factory=dict)
    _last_loss: float | None = None
    _last_skipped: str = ""
    _saved_step: int = -1
    _told_of_short_window: bool = False
    _dropped: int = 0
    _told_of_dropped: int = 0
    _told_of_unreadable: int = 0
    _told_of_slow_saves: bool = False
    _disk_error: OSError | None = None
    """Why the last save failed, on rank 0."""

    def run(self) -> dict[str, Any]:
        """Train, save, evaluate; return the summary that tells how it ended.

        Raises:
            ExactnessError: weights differ from their counts, or a gradient is not finite.
            SavedStateError: the final state could not be written.
        """
        began = time.perf_counter()
        self._meter = Meter(self.engine.device)
        self._clock = SaveClock(60 * self.config.save.minutes)
        self._saved_step = self.progress.step
        try:
            stopped = self._train()
        except Exception as error:
            self._save_what_was_trained(error)
            raise
        self._flush()
        # what was trained is on the disk before anything else of the user's runs
        if self._saved_step != self.progress.step and not self._save(is_last=True):
            raise SavedStateError(self.engine.ranks.alone(self._rescue))
        if self.progress.step >= self.total_steps:
            self._refuse_what_learnt_nothing()
        stopped = stopped or not self._evaluate()
        completed = not stopped and self.progress.step >= self.total_steps
        showcase = self._showcase() if completed else None
        return {
            "status": "completed" if completed else "stopped",
            "step": self.progress.step,
            "total_steps": self.total_steps,
            "loss": self._last_loss,
            "eval_loss": self._evaluation.get("loss"),
            "evaluation": self._evaluation,
            "updates": self.progress.updates,
            "skipped_steps": self.progress.skipped,
            "unreadable_samples": self.progress.unreadable,
            "showcase": showcase,
            "elapsed_s": time.perf_counter() - began,
        }

    def _save_what_was_trained(self, error: Exception) -> None:
        """After an error: no step is lost to it, whatever save.every says. The error itself is what is told.

        Only where every rank has left the training at the same place, with weights as after the last step.
        """
        in_window = bool(getattr(error, "before_update", False))
        while_reading = self.engine.ranks.world_size == 1 and isinstance(error, DataError)
        if not (in_window or while_reading) or self.progress.step == self._saved_step:
            return
        with contextlib.suppress(Exception):
            self.engine.optimizer.zero_grad(set_to_none=True)  # memory may be what is missing
            if in_window:
                self.engine.guard.restore_buffers()
            self._flush()
            self._save()

    def _train(self) -> bool:
        """Run the steps; returns whether a stop was asked for."""
        loader = self._loader(self.progress.step, self.total_steps, self.config.train.data_workers)
        every = self.config
        missing = self.evaluation_is_missing and self._evaluates_after(self.progress.step)
        if missing and not self._evaluate():
            return True
        previous = self._meter.mark()
        for loaded in loader:
            for text in loaded.notices:
                self.sinks.notice(text)
            before = self.progress
            lr = self.engine.learning_rate(before.updates)
            result, norm = self.engine.step(self._with_requests(loaded), before.updates)
            end = self._meter.mark()
            scale = self.engine.scaler.now() if self.engine.scaler else None
            self._pending.append(
                _Pending(loaded.index, result, norm, previous, end, before, lr, scale, loaded.skipped)
            )
            previous = end
            self._check_window(loaded, result)
            del loaded  # its memory may be wanted for the next one
            self._advance(result)
            step = self.progress.step
            stop = result.counts["stop"] > 0
            save_due = stop or result.counts["save"] > 0 or _is_due(step, every.save.every)
            eval_due = self._evaluates_after(step) and not stop
            log_due = step == 1 or step % every.train.log_every == 0 or len(self._pending) >= MOST_PENDING
            if result.skipped or save_due or eval_due or log_due:
                self._flush()
            if save_due:
                self._save()
                # a signal that came while the state was written: it is saved already
                stop = stop or self.engine.ranks.sum([float(self.stop_requested())])[0] > 0
            if eval_due and not stop:
                stop = not self._evaluate()
            if pauses := result.counts["pause"] > 0 and not stop:
                self.pause()
            if save_due or eval_due or pauses:
                previous = self._meter.mark()  # pauses are not part of the next step
            if stop:
                return True
        return False

    def _evaluates_after(self, step: int) -> bool:
        return _is_due(step, self.config.eval.every) and step < self.total_steps

    def _loader(self, start: int, stop: int, workers: int) -> WindowLoader:
        return WindowLoader(
            self.engine.task,
            self.schedule,
            self.engine.ranks,
            micro_batch=self.plan.micro_batch,
            shares=self.plan.shares if self.plan.world_size == self.engine.ranks.world_size else None,
            start=start,
            stop=stop,
            workers=workers,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _with_requests(self, loaded: LoadedWindow) -> LoadedWindow:
        """The window with what this rank asks of all: it travels with the counts."""
        loaded.counts.update(
            stop=self.stop_requested(),
            pause=self.pause_requested(),
            save=self.engine.ranks.rank == 0
            and (
                self._clock.is_due(before_evaluation=self._evaluates_after(self.progress.step + 1))
                or (self.run_folder is not None and self.run_folder.needs_state)
            ),
        )
        return loaded

    def _check_window(self, loaded: LoadedWindow, result: WindowResult) -> None:
        """Compare what the micro-batches of all ranks held with the window that the step is for.

        Raises:
            ExactnessError: samples are missing, are there twice, or are others.
        """
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

    def _advance(self, result: WindowResult) -> None:
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
        )

    def _flush(self) -> None:
        """Bring the pending steps' metrics to the host: the one place where the loop waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        if self.run_folder is not None:
            self.run_folder.look()
        self.engine.gradient.check_counts()
        names = list(pending[0].result.weight_totals)
        zero = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        local = [p.result.local_loss_sums.get(name, zero) for p in pending for name in names]
        scales = [p.loss_scale.double() for p in pending if p.loss_scale is not None]
        device_values = torch.stack([*local, *(p.norm.double() for p in pending), *scales]).tolist()
        norms = device_values[len(local) : len(local) + len(pending)]
        loss_scales = device_values[len(local) + len(pending) :] or [None] * len(pending)
        memory = self._peak_memory_of_ranks()
        sums = self.engine.ranks.sum(device_values[: len(local)])
        samples, tokens = self._counts_before(pending)
        unreadable = self._unreadable_of_ranks(pending)
        for nth, item in enumerate(pending):
            totals = item.result.weight_totals
            terms = {
                name: sums[nth * len(names) + place] / totals[name]
                for place, name in enumerate(names)
                if totals[name]
            }
            samples += int(item.result.counts["samples"])
            tokens += int(item.result.counts["tokens"])
            self._record(item, terms, norms[nth], loss_scales[nth], samples, tokens, memory, unreadable[nth])
        self._tell_of_thawed()
        for text in self.engine.new_notices():
            self.sinks.notice(f"step {self.progress.step}: {text}")

    def _tell_of_thawed(self) -> None:
        names = self.engine.newly_thawed()
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.sinks.notice(
                f"step {self.progress.step}: {names[0]}{more}, frozen when the run started, wants a gradient now. "
                "The optimizer does not hold what was frozen then: it is NOT trained. Let the factory return the "
                "model with it unfrozen, and start a new run."
            )

    def _counts_before(self, pending: list[_Pending]) -> tuple[int, int]:
        samples = self.progress.samples - sum(int(p.result.counts["samples"]) for p in pending)
        tokens = self.progress.tokens - sum(int(p.result.counts["tokens"]) for p in pending)
        return samples, tokens

    def _record(
        self,
        item: _Pending,
        terms: dict[str, float],
        norm: float,
        loss_scale: float | None,
        samples: int,
        tokens: int,
        memory: int,
        unreadable: list[str],
    ) -> None:
        loss = sum(terms.values())
        empty = item.result.is_empty
        step_s = self._meter.seconds(item.start, item.end)
        counts = item.result.counts
        finite = math.isfinite(loss) and math.isfinite(norm)
        nothing = "no label" if counts["samples"] else "no sample that can be read"
        skipped = nothing if empty else None if finite else "not finite"
        record: dict[str, Any] = {
            "step": item.index + 1,
            "loss": None if empty else loss,
            "grad_norm": norm,
            "lr": item.lr if skipped is None else None,
            "samples": samples,
            "dropped_samples": int(counts["dropped"]),
            "unreadable_samples": int(counts["unreadable"]),
            "tokens": tokens if counts["has_tokens"] else None,
            "samples_per_s": counts["samples"] / step_s,
            "tokens_per_s": counts["tokens"] / step_s if counts["has_tokens"] else None,
            "step_s": step_s,
            "peak_memory_bytes": memory,
            "window": f"{int(counts['digest']):013x}",
            "skipped": skipped,
            "skipped_steps": item.before.skipped + (skipped is not None),
            "loss_scale": loss_scale,
        }
        if len(item.result.weight_totals) > 1:
            record["loss_terms"] = terms
        if unreadable:
            record["unreadable"] = unreadable
        self.sinks.step(record)
        self._last_skipped = skipped or self._last_skipped
        self._tell_of_unreadable(item, unreadable)
        if not finite:
            self._not_finite(item, loss, norm)
            return
        self._last_loss = self._last_loss if empty else loss
        if norm and not self.progress.moved:
            self.progress = dataclasses.replace(self.progress, moved=True)
        self._tell_of_dropped(item.index + 1, int(counts["dropped"] - counts["unreadable"]))
        given = counts["samples"] + counts["dropped"]
        if empty:
            self.sinks.notice(
                f"step {item.index + 1}: every label of the window is masked; no update was made."
                if counts["samples"] or not counts["unreadable"]
                else f"step {item.index + 1}: no sample of the window can be read; no update was made."
            )
        elif given < self.schedule.effective_batch and not self._told_of_short_window:
            self._told_of_short_window = True
            self.sinks.notice(
                f"step {item.index + 1} ends an epoch with a window of {int(given)} samples, as every epoch will; "
                "its gradient is the exact mean over those."
            )

    def _not_finite(self, item: _Pending, loss: float, norm: float) -> None:
        """Find what made a window not finite; then go on after it or end before it.

        Raises:
            ExactnessError: `train.nonfinite` is not skip, too many came in a row, or it can only go on so.
        """
        train = self.config.train
        self.engine.guard.restore_buffers()
        findings = self._search(item)
        what = "the loss is {loss:g}" if not math.isfinite(loss) else "the gradient's norm is {norm:g}"
        what = f"step {item.index + 1} is not finite: {what.format(loss=loss, norm=norm)}."
        story = nonfinite.story(findings, self.engine.task.train_data, loss, norm, item.before.updates)
        in_row = item.before.nonfinite_in_row + 1
        if item.result.skipped and train.nonfinite == "skip" and findings.parameter is None:
            if in_row <= train.nonfinite_limit:
                self.sinks.notice(f"{what} Skipped, no rank made an update. {story}")
                return
            story = f"It is number {in_row} in a row (train.nonfinite_limit={train.nonfinite_limit}). {story}"
        self.progress = dataclasses.replace(item.before, moved=self.progress.moved)
        where = ""
        if findings.parameter is None and self._save_once():
            where = f" The state before it is saved as that of step {self.progress.step}."
        remedies = self._remedies(item.before.updates).lines(findings)
        helps = "\nWhat helps:\n" + "\n".join(f"- {line}" for line in remedies) if remedies else ""
        raise ExactnessError(f"{what} {story}{where}{helps}")

    def _remedies(self, updates: int) -> nonfinite.Remedies:
        train, optimizer = self.config.train, self.config.optimizer
        return nonfinite.Remedies(
            run_dir=self.run_dir,
            lr=optimizer.lr,
            clip_norm=optimizer.clip_norm,
            skips=train.nonfinite == "skip",
            limit=train.nonfinite_limit,
            precision=self.engine.settings.precision,
            updates=updates,
            can_resume=self.engine.ranks.share_object(bool(self.run_dir.saved_steps())),
        )

    def _search(self, item: _Pending) -> nonfinite.Findings:
        """Read the window once more and look for the samples that make it not finite. Collective."""
        (loaded,) = self._loader(item.index, item.index + 1, workers=0)
        return nonfinite.Search(self.engine, loaded, item.result.weight_totals, self.schedule.seed).run()

    def _save_once(self) -> bool:
        """Whether the state of this step is on the disk, saved now if it was not. Collective."""
        known = self.run_dir.saved_steps() if self.engine.ranks.rank == 0 else []
        return self.engine.ranks.share_object(self.progress.step in known) or self._save()

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

    def _tell_of_dropped(self, step: int, dropped: int) -> None:
        """Say it at the first sample that collate drops, and again when there are ten times as many."""
        self._dropped += dropped
        if self._dropped and self._dropped >= 10 * self._told_of_dropped:
            self._told_of_dropped = self._dropped
            self.sinks.notice(
                f"collate dropped {self._dropped} samples up to step {step}: losses and gradients are the exact "
                "means over the others, and the count of samples leaves them out."
            )

    def _unreadable_of_ranks(self, pending: list[_Pending]) -> list[list[str]]:
        """What was skipped on any rank, for each pending step; the ranks talk only where there is something."""
        if not any(item.result.counts["unreadable"] for item in pending):
            return [[] for _ in pending]
        parts = self.engine.ranks.gather([item.unreadable for item in pending])
        return [[text for rank in parts for text in rank[nth]] for nth in range(len(pending))]

    def _tell_of_unreadable(self, item: _Pending, unreadable: list[str]) -> None:
        """Say it at the first sample, and again when there are ten times as many since the run began."""
        count = item.before.unreadable + len(unreadable)
        if unreadable and count >= 10 * self._told_of_unreadable:
            self._told_of_unreadable = count
            more = f"; and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
            self.sinks.notice(
                f"{count} samples up to step {item.index + 1} could not be read and have weight zero: losses and "
                f"gradients are the exact means over the others. {'; '.join(unreadable[:3])}{more}. All are listed "
                f"in {self.run_dir.metrics.name}."
            )

    def _peak_memory_of_ranks(self) -> int:
        ranks = self.engine.ranks
        slots = [0.0] * ranks.world_size
        slots[ranks.rank] = float(self._meter.peak_memory_bytes())
        return int(max(ranks.sum(slots)))

    def _evaluate(self) -> bool:
        """Evaluate; False where a stop was asked for meanwhile. An error of it costs this evaluation alone."""
        began = self._clock.now()
        try:
            found = evaluate(
                self.engine,
                samples=self.config.eval.samples,
                micro_batch=self.plan.micro_batch,
                workers=self.config.train.data_workers,
                stop_requested=self.stop_requested,
                describe=self.aftermath.describe,
            )
        except EvaluationStopped:
            return False
        except EvaluationError as error:
            self.aftermath.add("the evaluation", str(error), f"after step {self.progress.step}")
            found = {}
        self._clock.evaluated(began)
        self._evaluation = found
        if found:
            self.sinks.evaluation(self.progress.step, found)
        return True

    def _save(self, is_last: bool = False) -> bool:
        """Write the state on rank 0, after everything before it was checked. A full disk is not fatal."""
        began = self._clock.now()
        self.engine.share_buffers()
        if name := nonfinite.first_bad_parameter(self.engine):
            raise ExactnessError(
                f"after step {self.progress.step} the parameter {name} is not finite, so its state is not saved: "
                "an update made it so. For a lower rate: "
                f"{self._remedies(self.progress.updates).lower_rate()}"
            )
        # the others wait for the disk outside of any collective, which would fail after its timeout
        is_written = self.engine.ranks.alone(lambda: self._write(began, is_last))
        if is_written:
            self._saved_step = self.progress.step
        return is_written

    def _write(self, began: float, is_last: bool) -> bool:
        """Rank 0's part of a save; False where the state could not be written."""
        step = self.progress.step
        if self.run_folder is not None:
            self.run_folder.look()
        moved_to = self.run_folder.moved_to if self.run_folder is not None else None
        try:
            path = self._write_to(RunDir(moved_to).saved if moved_to is not None else self.run_dir.saved)
        except OSError as error:
            self._clock.failed()
            self._disk_error = disk.known(error)
            if not is_last:
                self.sinks.notice(
                    f"could not save the state of step {step}: {disk.reason(error)}. "
                    "Training goes on; earlier saved states are kept."
                )
            return False
        self._clock.saved(began)
        self.sinks.saved(step, path)
        self._tell_of_slow_saves()
        if self.run_folder is not None:
            self.run_folder.state_is_saved(step)
        return True

    def _write_to(self, folder: Path) -> Path:
        scaler = self.engine.scaler.state_dict() if self.engine.scaler else None
        return saved_state.save(
            folder,
            dataclasses.replace(self.progress, scaler=scaler),
            self.engine.model,
            self.engine.optimizer,
            self.config.save.keep,
            self.engine.masters,
            self.sinks.notice,
        )

    def _rescue(self) -> str:
        """Rank 0's last resort, in words."""
        assert self._disk_error is not None
        return rescue(self.run_dir, self.progress.step, self._disk_error, self._write_to)

    def _tell_of_slow_saves(self) -> None:
        if self._clock.is_too_slow() and not self._told_of_slow_saves:
            self._told_of_slow_saves = True
            self.sinks.notice(
                f"writing a state takes {self._clock.write_s:.0f} s, too long for save.minutes="
                f"{self.config.save.minutes:g}: up to three times as long can be lost."
            )

    def _showcase(self) -> str | None:
        shown = None
        if self.engine.ranks.rank == 0:
            with self.aftermath.guard("the sample of what was learnt (showcase)"):
                shown = self.engine.showcase()
        return shown


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
