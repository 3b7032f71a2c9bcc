"""When and where a run's states are written, and what is said of it. Rank 0 writes, the others wait."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from gatrain import disk
from gatrain.config import RunConfig
from gatrain.errors import ExactnessError, SavedStateError
from gatrain.rundir import RunDir
from gatrain.states import keep_state
from gatrain.train import nonfinite, saved_state
from gatrain.train.agreement import ranks_differ
from gatrain.train.engine import Engine
from gatrain.train.events import Sink
from gatrain.train.hooks import Hooks
from gatrain.train.module_numbers import ModuleNumbers
from gatrain.train.nonfinite_policy import remedies
from gatrain.train.rescue import rescue
from gatrain.train.run_folder import RunFolder
from gatrain.train.save_clock import SaveClock
from gatrain.train.saved_state import Progress


@dataclass
class StateSaver:
    """Writes the states of one run. `save`, `save_once` and `save_last` are collective.

    Args:
        run_folder: on rank 0.
        saved_step: the step whose state is on the disk; -1 where there is none.
    """

    engine: Engine
    config: RunConfig
    run_dir: RunDir
    sinks: Sink
    run_folder: RunFolder | None
    hooks: Hooks
    saved_step: int = -1
    _disk_error: OSError | None = None
    """Why the last save failed, on rank 0."""
    _slowness_told: bool = False
    _told: set[str] = field(default_factory=set)
    """In what ranks differ, and what is not saved."""

    def __post_init__(self) -> None:
        self.clock = SaveClock(60 * self.config.save.minutes)
        self._numbers = ModuleNumbers(self.engine.model)

    def is_wanted(self, *, before_evaluation: bool) -> bool:
        """Whether a state must be written after the step that begins now. Asked on rank 0, once a step."""
        is_due = self.clock.is_due(before_evaluation=before_evaluation)
        return is_due or (self.run_folder is not None and self.run_folder.needs_state)

    def save(self, progress: Progress, *, is_last: bool = False) -> bool:
        """Write the state, after everything before it was checked. A full disk is not fatal: then it is False."""
        began = self.clock.now()
        self.engine.share_buffers()
        if name := nonfinite.first_bad_parameter(self.engine):
            helps = remedies(self.engine, self.config, self.run_dir, progress.updates).lower_rate()
            raise ExactnessError(
                f"after step {progress.step} the parameter {name} is not finite, so its state is not saved: "
                f"an update made it so. For a lower rate: {helps}"
            )
        if name := self.engine.replaced():
            raise ExactnessError(
                f"after step {progress.step} the model has another parameter {name} than the one that is trained, "
                "so its state is not saved: a hook or the model put a new nn.Parameter there. Change the values of "
                "the one that is there: parameter.copy_(...) under torch.no_grad()."
            )
        unsaved = self.engine.strategy_state.unsaved()
        engine = self.engine
        differing = ranks_differ(engine.model, self.hooks, engine.ranks, engine.step.strategy)
        for text in [*differing, unsaved, self._numbers.unsaved(), engine.built.late()]:
            if text and text not in self._told:
                self._told.add(text)
                self.sinks.notice(f"step {progress.step}: {text}")
        # the others wait for the disk outside of any collective, which would fail after its timeout
        is_written = self.engine.ranks.alone(lambda: self._write(progress, began, is_last))
        if is_written:
            self.saved_step = progress.step
        return is_written

    def save_once(self, progress: Progress) -> bool:
        """Whether the state of this step is on the disk, saved now if it was not."""
        known = self.run_dir.saved_steps() if self.engine.ranks.rank == 0 else []
        return self.engine.ranks.share_object(progress.step in known) or self.save(progress)

    def keep(self, progress: Progress, name: str) -> None:
        """Let the state of this step stay in the run folder's ``kept/name``, in place of what was kept there."""

        def link() -> None:
            try:
                keep_state(self.run_dir.state(progress.step), self.run_dir.kept / name)
            except OSError as error:
                self.sinks.notice(
                    f"could not keep the state of step {progress.step} in {self.run_dir.kept / name}: "
                    f"{disk.reason(error)}. What was kept there before is still there."
                )

        if self.saved_step == progress.step or self.save(progress):
            self.engine.ranks.alone(link)

    def save_last(self, progress: Progress) -> None:
        """Write the state that a run ends with, somewhere else if need be.

        Raises:
            SavedStateError: the run folder does not take it; says where it is.
        """
        if self.saved_step == progress.step or self.save(progress, is_last=True):
            return

        def rescued() -> str:
            assert self._disk_error is not None
            return rescue(
                self.run_dir, progress.step, self._disk_error, lambda folder: self._write_to(folder, progress)
            )

        raise SavedStateError(self.engine.ranks.alone(rescued))

    def _write(self, progress: Progress, began: float, is_last: bool) -> bool:
        """Rank 0's part of a save."""
        if self.run_folder is not None:
            self.run_folder.look()
        moved_to = self.run_folder.moved_to if self.run_folder is not None else None
        run_dir = RunDir(moved_to) if moved_to is not None else self.run_dir
        try:
            path = self._write_to(run_dir.saved, progress)
        except OSError as error:
            self.clock.failed()
            self._disk_error = disk.known(error)
            if not is_last:
                self.sinks.notice(
                    f"could not save the state of step {progress.step}: {disk.reason(error)}. "
                    "Training goes on; earlier saved states are kept."
                )
            return False
        self.clock.saved(began)
        self.sinks.saved(progress.step, path)
        self.hooks.saved(progress.step, path)
        self._tell_of_slowness()
        if self.run_folder is not None:
            self.run_folder.state_is_saved(progress.step)
        return True

    def _write_to(self, folder: Path, progress: Progress) -> Path:
        scaler = self.engine.scaler.state_dict() if self.engine.scaler else None
        state = saved_state.snapshot(
            dataclasses.replace(progress, scaler=scaler),
            self.engine.model,
            self.engine.optimizer,
            self.engine.masters,
            {
                **self.hooks.parts(),
                **self.engine.built.parts(),
                **self.engine.scaling.parts(),
                **self.engine.strategy_state.parts(),
            },
            self.hooks.exports(),
        )
        return saved_state.write(folder, state, self.config.save.keep, self.sinks.notice)

    def _tell_of_slowness(self) -> None:
        if self.clock.is_too_slow() and not self._slowness_told:
            self._slowness_told = True
            self.sinks.notice(
                f"writing a state takes {self.clock.write_s:.0f} s, too long for save.minutes="
                f"{self.config.save.minutes:g}: up to three times as long can be lost."
            )
