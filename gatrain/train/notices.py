"""What a person should know of a step: said at its first time, and again only where it has grown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gatrain.train.records import StepRecord
from gatrain.train.step_metrics import PendingStep

MOST_NAMED = 3
STEEP = 1e6
"""Gradient norm, and how often ``optimizer.clip_norm`` is in it, from which clipping hides a fault."""


@dataclass
class Notices:
    """What was told so far.

    Args:
        tell: hears each notice.
        full: samples of a full window, by its index.
        metrics_file: where every skipped sample is listed.
        has_stages: the effective batch changes, so epochs end with windows of several sizes.
        clip_norm: ``optimizer.clip_norm``.
    """

    tell: Callable[[str], None]
    full: Callable[[int], int]
    metrics_file: str
    has_stages: bool = False
    clip_norm: float | None = None
    _steep_told: bool = False
    _short_window_told: bool = False
    _dropped: int = 0
    _dropped_told: int = 0
    _unreadable_told: int = 0

    def unreadable(self, step: PendingStep, record: StepRecord) -> None:
        """Say it at the first sample, and again when there are ten times as many since the run began."""
        found = record.unreadable
        count = step.before.unreadable + len(found)
        if found and count >= 10 * self._unreadable_told:
            self._unreadable_told = count
            more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            self.tell(
                f"{count} samples up to step {record.step} could not be read and have weight zero: losses and "
                f"gradients are the exact means over the others. {'; '.join(found[:MOST_NAMED])}{more}. All are "
                f"listed in {self.metrics_file}."
            )

    def window(self, step: PendingStep, record: StepRecord) -> None:
        """Of a window that is finite: what collate left out, and that it is empty or short."""
        counts = step.result.counts
        self._tell_of_dropped(record.step, record.dropped_samples - record.unreadable_samples)
        if step.result.is_empty:
            self.tell(
                f"step {record.step}: every label of the window is masked; no update was made."
                if counts["samples"] or not counts["unreadable"]
                else f"step {record.step}: no sample of the window can be read; no update was made."
            )
            return
        self._tell_of_steep(record)
        given = int(counts["samples"] + counts["dropped"])
        if given < self.full(step.index) and not self._short_window_told:
            self._short_window_told = True
            every = "may, of whatever is left" if self.has_stages else "will"
            samples, those = ("1 sample", "that one") if given == 1 else (f"{given} samples", "those")
            self.tell(
                f"step {record.step} ends an epoch with a window of {samples}, as every epoch {every}; its "
                f"gradient is the exact mean over {those}."
            )

    def thawed(self, step: int, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.tell(
                f"step {step}: {names[0]}{more}, frozen when the run started, wants a gradient now. "
                "The optimizer does not hold what was frozen then: it is NOT trained. Let the factory return the "
                "model with it unfrozen, and start a new run."
            )

    def _tell_of_steep(self, record: StepRecord) -> None:
        """Say once that clipping kept next to nothing of a gradient: what it hides is seldom meant."""
        clip, norm = self.clip_norm, record.grad_norm
        if clip is not None and not self._steep_told and norm >= STEEP * max(clip, 1.0):
            self._steep_told = True
            self.tell(
                f"step {record.step}: the gradient's norm is {norm:.3g}, and optimizer.clip_norm={clip:g} made an "
                "update of it that follows its few largest values alone. Often one sample is the cause, by a "
                "division by something next to zero, such as the length of a vector of zeros."
            )

    def _tell_of_dropped(self, step: int, dropped: int) -> None:
        """Say it at the first sample that collate drops, and again when there are ten times as many."""
        self._dropped += dropped
        if self._dropped and self._dropped >= 10 * self._dropped_told:
            self._dropped_told = self._dropped
            self.tell(
                f"collate dropped {self._dropped} samples up to step {step}: losses and gradients are the exact "
                "means over the others, and the count of samples leaves them out."
            )
