"""What becomes of a run at a window that is not finite: the samples are looked for, and it goes on or ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gatrain.config import RunConfig
from gatrain.rundir import RunDir
from gatrain.train import nonfinite
from gatrain.train.engine import Engine
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.records import StepRecord
from gatrain.train.saved_state import Progress
from gatrain.train.step_metrics import PendingStep


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    text: str
    findings: nonfinite.Findings
    goes_on: bool
    """The window was skipped, and training goes on."""
    state_is_good: bool
    """Whether the state before the window can be saved."""


@dataclass(frozen=True)
class NonFinitePolicy:
    """Judges windows that are not finite. Collective.

    Args:
        window_at: reads this rank's part of the window that follows once more.
    """

    engine: Engine
    config: RunConfig
    window_at: Callable[[Progress], LoadedWindow]

    def judge(self, step: PendingStep, record: StepRecord) -> Verdict:
        """Put the buffers back as they were before the window, and find what made it not finite."""
        self.engine.guard.restore_buffers()
        self.engine.step.number = step.before.updates  # which the loss may depend on
        window, seed = self.window_at(step.before), self.config.train.seed
        findings = nonfinite.Search(self.engine, window, step.result.weight_totals, seed).run()
        loss, norm = record.loss or 0.0, record.grad_norm
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the gradient's norm is {norm:g}"
        what = f"step {record.step} is not finite: {what}."
        story = nonfinite.story(findings, self.engine.task.train_data, loss, norm, step.before.updates)
        train, in_row = self.config.train, step.before.nonfinite_in_row + 1
        is_good = findings.parameter is None and self.engine.step.strategy.keeps_state
        if step.result.skipped and train.nonfinite == "skip" and findings.parameter is None:
            if in_row <= train.nonfinite_limit:
                return Verdict(f"{what} Skipped, no rank made an update. {story}", findings, True, is_good)
            story = f"It is number {in_row} in a row (train.nonfinite_limit={train.nonfinite_limit}). {story}"
        return Verdict(f"{what} {story}", findings, False, is_good)


def remedies(engine: Engine, config: RunConfig, run_dir: RunDir, updates: int) -> nonfinite.Remedies:
    """What helps, with commands that go on with this run. Collective."""
    return nonfinite.Remedies(
        run_dir=run_dir,
        lr=engine.built.lr,
        may_clip=config.optimizer.clips is None and engine.step.strategy.holds_gradients,
        may_skip=engine.step.strategy.keeps_state,
        skips=config.train.nonfinite == "skip",
        limit=config.train.nonfinite_limit,
        precision=engine.settings.precision,
        updates=updates,
        can_resume=engine.ranks.share_object(bool(run_dir.saved_steps())),
    )
