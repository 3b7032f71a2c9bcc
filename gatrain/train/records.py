"""What the training loop hands to loggers: one record for each step, and one for the run at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step, over all ranks. `to_dict` is its line in metrics.jsonl.

    Records arrive in order, several at once when the metrics leave the device.
    """

    step: int
    """From 1: windows consumed, those without an update included."""
    loss: float | None
    """Mean over the window; None where no sample of it has a weight."""
    grad_norm: float
    """Of the whole reduced gradient, before clipping."""
    lr: float | None
    """The rate used; None for a step that made no update."""
    samples: int
    """Trained on so far, this step included."""
    samples_per_s: float
    step_s: float
    window: str
    """Hash of the window's sample ids: the same whatever the split."""
    dropped_samples: int = 0
    """Samples of the window that are in no batch."""
    unreadable_samples: int = 0
    """Those of them that could not be read."""
    tokens: int | None = None
    """Trained on so far; None where samples have no tokens."""
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    """The largest of any rank so far."""
    skipped: str | None = None
    """Why the step made no update."""
    skipped_steps: int = 0
    """How many have made none so far."""
    loss_scale: float | None = None
    """Of fp16."""
    effective_batch: int | None = None
    """Samples of a full window from here on, at the first step of each stage where it changes over the run."""
    loss_terms: Mapping[str, float] = field(default_factory=dict)
    """The mean of each term where there are several; their sum is `loss`."""
    unreadable: tuple[str, ...] = ()
    """Each sample that could not be read, with the reason."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What hooks measured, by name."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Where a hook wants it: parts of the window whose gradients were measured before they were added up. Their
    ``count``, their ``weight`` of the window's ``total``, its ``samples``, and ``squared``: the sum over the parts
    of weight * |mean gradient of the part|**2."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; mappings and lists that are empty are left out."""
        return _without_empty(self, "loss_terms", "unreadable", "metrics", "parts", "effective_batch")


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. `to_dict` is summary.json."""

    status: str
    """``completed`` or ``stopped``."""
    step: int
    total_steps: int
    loss: float | None
    """Of the last step that had one."""
    eval_loss: float | None
    evaluation: Mapping[str, Any]
    """All numbers of the last evaluation."""
    updates: int
    skipped_steps: int
    unreadable_samples: int
    showcase: str | None
    """What `gatrain.Task.showcase` gave: a generated sample, say."""
    elapsed_s: float
    stopped_early: str | None = None
    """Why a hook ended the run before its last step."""
    findings: Mapping[str, str] = field(default_factory=dict)
    """What hooks found out, in words, by label."""
    baseline: Mapping[str, Any] | None = None
    """``name`` and ``loss`` of what a model without training reaches."""
    left_out: str | None = None
    unreadable: tuple[str, ...] = ()
    """Each sample that could not be read in any part of the run, with the reason."""
    weights: str | None = None
    """Path of the trained weights, relative to the run folder."""
    exported: Mapping[str, str] = field(default_factory=dict)
    """Paths of further weights that hooks exported, by name: an average, say."""
    failed: tuple[str, ...] = ()
    """A line for each thing beside the training that failed."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return _without_empty(self)


def _without_empty(record: StepRecord | RunSummary, *names: str) -> dict[str, Any]:
    found = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
    return {name: value for name, value in found.items() if value or name not in names}
