"""The metrics of steps wait on the device and leave it together: the one place where the loop waits for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from gatrain.train.engine import Engine
from gatrain.train.meter import Mark, Meter
from gatrain.train.part_norms import window_parts
from gatrain.train.records import StepRecord
from gatrain.train.saved_state import Progress
from gatrain.train.window_result import WindowResult


@dataclass(frozen=True)
class PendingStep:
    """A step whose metrics are still on the device."""

    index: int
    result: WindowResult
    norm: Tensor
    """Of the gradient before clipping: a scalar on the device."""
    start: Mark
    end: Mark
    before: Progress
    lr: float
    loss_scale: Tensor | None
    unreadable: Sequence[str]
    """Samples of this rank's part that were skipped, each with the reason."""
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    """What hooks measured: scalars on the device or the host."""


class StepMetrics:
    """The steps whose metrics are still on the device, on this rank."""

    def __init__(self, engine: Engine) -> None:
        self.meter = Meter(engine.device)
        self._engine = engine
        self._pending: list[PendingStep] = []
        self._past = 0
        """Pending steps that the device has done."""
        self.finished = 0
        """The last step that the device has done, as far as was seen without waiting for it."""

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: PendingStep) -> None:
        self._pending.append(step)
        # asked here and in no other thread: a query from one beside it would spoil a CUDA graph's capture
        while self._past < len(self._pending) and self.meter.is_past(self._pending[self._past].end):
            self.finished = self._pending[self._past].index + 1
            self._past += 1

    def take(self) -> list[tuple[PendingStep, StepRecord]]:
        """Bring the metrics of the pending steps to the host, in order. Collective; waits for the device once."""
        pending, self._pending, self._past = self._pending, [], 0
        if not pending:
            return []
        engine = self._engine
        engine.step.counts.check()
        names = list(pending[0].result.weight_totals)
        zero = torch.zeros((), dtype=torch.float64, device=engine.device)
        losses = [p.result.local_loss_sums.get(name, zero) for p in pending for name in names]
        scales = [p.loss_scale.double() for p in pending if p.loss_scale is not None]
        norms = [p.norm.double() for p in pending]
        measured = [v for p in pending for v in p.metrics.values() if isinstance(v, Tensor)]
        extra = [value.to(engine.device, torch.float64) for value in measured]
        parts = [p.result.part.norm.double() for p in pending if p.result.part is not None]
        # the device is waited for here
        values = iter(torch.stack([*losses, *norms, *scales, *parts, *extra]).tolist())
        local = list(islice(values, len(losses)))
        norms_read = list(islice(values, len(norms)))
        scales_read = list(islice(values, len(scales))) or [None] * len(pending)
        part_norms = islice(values, len(parts))
        squares = [0.0 if p.result.part is None else p.result.squared_part(next(part_norms)) for p in pending]
        metrics = [
            {name: next(values) if isinstance(v, Tensor) else v for name, v in p.metrics.items()}
            for p in pending
        ]
        memory = self._peak_memory_of_ranks()
        sums = engine.ranks.sum([*squares, *local])
        squares, sums = sums[: len(pending)], sums[len(pending) :]
        unreadable = self._unreadable_of_ranks(pending)
        found = []
        for nth, step in enumerate(pending):
            totals = step.result.weight_totals
            terms = {
                name: sums[nth * len(names) + place] / totals[name]
                for place, name in enumerate(names)
                if totals[name]
            }
            record = self._record(step, terms, norms_read[nth], scales_read[nth], memory, unreadable[nth])
            parts_of_window = window_parts(step.result.counts, totals, squares[nth])
            found.append((step, replace(record, metrics=metrics[nth], parts=parts_of_window)))
        return found

    def _record(
        self,
        step: PendingStep,
        terms: dict[str, float],
        norm: float,
        loss_scale: float | None,
        memory: int,
        unreadable: list[str],
    ) -> StepRecord:
        counts, before = step.result.counts, step.before
        loss, is_empty = sum(terms.values()), step.result.is_empty
        step_s = self.meter.seconds(step.start, step.end)
        skipped = None
        if is_empty:
            skipped = "no label" if counts["samples"] else "no sample that can be read"
        elif not (math.isfinite(loss) and math.isfinite(norm)):
            skipped = NOT_FINITE
        return StepRecord(
            step=step.index + 1,
            loss=None if is_empty else loss,
            grad_norm=norm,
            lr=step.lr if skipped is None else None,
            samples=before.samples + int(counts["samples"]),
            dropped_samples=int(counts["dropped"]),
            unreadable_samples=int(counts["unreadable"]),
            tokens=before.tokens + int(counts["tokens"]) if counts["has_tokens"] else None,
            samples_per_s=counts["samples"] / step_s,
            tokens_per_s=counts["tokens"] / step_s if counts["has_tokens"] else None,
            step_s=step_s,
            peak_memory_bytes=memory,
            window=f"{int(counts['digest']):013x}",
            skipped=skipped,
            skipped_steps=before.skipped + (skipped is not None),
            loss_scale=loss_scale,
            loss_terms=terms if len(step.result.weight_totals) > 1 else {},
            unreadable=tuple(unreadable),
        )

    def _unreadable_of_ranks(self, pending: list[PendingStep]) -> list[list[str]]:
        """What was skipped on any rank, for each pending step; the ranks talk only where there is something."""
        if not any(item.result.counts["unreadable"] for item in pending):
            return [[] for _ in pending]
        parts = self._engine.ranks.gather([item.unreadable for item in pending])
        return [[text for rank in parts for text in rank[nth]] for nth in range(len(pending))]

    def _peak_memory_of_ranks(self) -> int:
        ranks = self._engine.ranks
        slots = [0.0] * ranks.world_size
        slots[ranks.rank] = float(self.meter.peak_memory_bytes())
        return int(max(ranks.sum(slots)))


NOT_FINITE = "not finite"
"""Why a step made no update, in `StepRecord.skipped`."""
