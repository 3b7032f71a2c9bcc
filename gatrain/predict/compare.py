"""Predicted beside measured peak memory of the trials that chose a plan, for `gatrain autotune` to show.

    with compare.start(composed, memory_bytes=..., capability=..., world_size=...) as tracing:
        plan = ...  # the trials
        lines = tracing.lines(plan, timeout_s=1.0)

The tracing process runs beside the trials at the lowest priority. Nothing here raises, and whatever becomes of that
process, the tuner goes on: there is just nothing to show.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from gatrain import offspring, scratch, units
from gatrain.compose import Composed
from gatrain.hardware import native_precision
from gatrain.plan import FITS, Plan, Trial
from gatrain.predict import child, overheads
from gatrain.predict.request import ModeTrace, TraceRequest, TraceResult, request_for

MOST_ROWS = 3
NICENESS = 19


class Tracing:
    """A tracing process that may be asked for what it found, once it is done. Close it, whatever happens."""

    def __init__(self, precision: str, capability: tuple[int, int]) -> None:
        self.precision = precision
        self.capability = capability
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> Tracing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, config_yaml: str, asked: TraceRequest, cwd: Path | None) -> None:
        """Start the process; without one there is no result."""
        try:
            self._folder = scratch.make("gatrain-compare-")
            self._process = child.start(self._folder, config_yaml, [asked], cwd, niceness=NICENESS)
        except OSError:
            self.close()

    def result(self, timeout_s: float = 0.0) -> TraceResult | None:
        """What was traced; None if the process is not done in time, or failed."""
        if self._process is None or self._folder is None:
            return None
        try:
            self._process.wait(timeout_s)
            return child.read_result(self._folder, self._process.returncode)[0]
        except Exception:  # out of time, the model's own error, a file that is not whole
            return None

    def lines(self, plan: Plan, timeout_s: float = 0.0) -> list[str]:
        """`comparison_lines` for what was traced; none if there is nothing to show."""
        try:
            return comparison_lines(plan, self.result(timeout_s), self.precision, self.capability)
        except Exception:  # a remark at the end must not cost the plan
            return []

    def close(self) -> None:
        """End the process and remove what it wrote."""
        if self._process is not None:
            offspring.end(self._process)
        if self._folder is not None:
            child.remove(self._folder)
        self._process = self._folder = None


def start(
    composed: Composed,
    *,
    memory_bytes: int,
    capability: tuple[int, int],
    world_size: int = 1,
    precision: str | None = None,
    cwd: Path | None = None,
) -> Tracing:
    """Begin to trace a recipe, uncompiled, for a GPU that need not be in the table. Returns at once.

    Args:
        composed: the recipe and its overrides.
        memory_bytes: of the GPU: steps that need more are not traced.
        capability: its compute capability.
        world_size: ranks, one for each GPU.
        precision: what the trials compute in; None means what the recipe says of such a GPU.
        cwd: folder whose modules `_target_` may name; default the current one.
    """
    config = composed.config
    if precision is None:
        precision = native_precision(capability) if config.precision == "auto" else config.precision
    asked = replace(request_for(config, memory_bytes, world_size, precision), compile=False)
    tracing = Tracing(precision, capability)
    tracing.begin(composed.yaml, asked, cwd)
    return tracing


def comparison_lines(
    plan: Plan, trace: TraceResult | None, precision: str, capability: tuple[int, int]
) -> list[str]:
    """A line for each of the largest uncompiled trials that were measured, below a title; none if there are none.

    A trial's peak is what the allocator held, and what was taken beside it since the CUDA context was there.

    Args:
        plan: with its trials.
        trace: of uncompiled code in ``precision``.
        capability: compute capability of the GPU that was measured.
    """
    modes = {} if trace is None else {each.mode: each for each in trace.traces}
    trials = [each for each in plan.trials if each.checkpointing in modes and _is_measured(each, precision)]
    shown = sorted(trials, key=lambda trial: trial.peak_memory_bytes or 0)[-MOST_ROWS:]
    if not shown:
        return []
    lines = [f"Peak memory as predicted without a GPU, and as measured ({precision}, not compiled):"]
    for trial in shown:
        mode = trial.checkpointing
        sizes = [each.micro_batch for each in trials if each.checkpointing == mode]
        expected = trial_peak(modes[mode], sizes, trial.micro_batch, capability, plan.world_size)
        measured = trial.peak_memory_bytes or 1
        lines.append(
            f"  micro-batch {trial.micro_batch}, checkpointing {mode}: predicted {units.size(expected)}, "
            f"measured {units.size(measured)} ({expected / measured - 1:+.1%})"
        )
    return lines


def trial_peak(
    trace: ModeTrace, sizes: Iterable[int], micro_batch: int, capability: tuple[int, int], world_size: int
) -> int:
    """The peak that a trial of `gatrain.tune` should show at one of the sizes that its process runs in turn."""
    rising = sorted({micro_batch, *(size for size in sizes if size < micro_batch)})
    peaks = trace.peaks_in_turn(rising, overheads.workspace_bytes(capability))
    return peaks[micro_batch].reserved + overheads.growth_bytes(world_size)


def _is_measured(trial: Trial, precision: str) -> bool:
    has_peak = trial.outcome == FITS and (trial.peak_memory_bytes or 0) > 0
    return has_peak and not trial.compile and trial.precision == precision
