"""The plan: the chosen split with its reasons and all trials. Plain data that survives JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gatrain import batch, codec, schema
from gatrain.config import CHECKPOINTING, PRECISIONS, SYNCS

FITS, DOES_NOT_FIT, FAILED, SKIPPED = "fits", "does_not_fit", "failed", "skipped"


@dataclass(frozen=True)
class Trial:
    """One candidate and what was measured of it, on the slowest rank.

    ``outcome`` is one of ``fits``, ``does_not_fit``, ``failed`` (with ``error``) and ``skipped`` (predicted not
    to fit, or out of time; ``error`` says which). Times are seconds, memory is bytes; None where not measured.
    """

    micro_batch: int
    precision: str
    checkpointing: str
    compile: bool
    outcome: str
    peak_memory_bytes: int | None = None
    micro_step_s: float | None = None
    reduce_s: float | None = None
    optimizer_s: float | None = None
    samples_per_s: float | None = None
    """Samples per second over all ranks, whole optimizer steps included."""
    step_s: float | None = None
    """Predicted seconds of one optimizer step at the effective batch with this micro-batch."""
    confirmed_step_s: float | None = None
    """Median seconds of whole optimizer steps at the effective batch (all micro-steps, the
    reduction, the update), timed in turn with the other finalists; None for all but finalists."""
    confirmed_steps: int | None = None
    """Whole steps behind that median."""
    loss: float | None = None
    """Loss of the trial's samples per unit of weight: equal samples must give equal losses."""
    error: str | None = None


@dataclass(frozen=True)
class StepSettings:
    """How one micro-step is computed, apart from its size. No value is ``auto``."""

    precision: str
    checkpointing: str
    compile: bool
    sync: str

    def check(self) -> None:
        """
        Raises:
            ValueError: names the value that is none of those allowed.
        """
        schema.one_of(PRECISIONS[1:], precision=self.precision)
        schema.one_of(CHECKPOINTING[1:], checkpointing=self.checkpointing)
        schema.one_of(SYNCS[1:], sync=self.sync)


@dataclass(frozen=True)
class Plan:
    """How one effective batch is computed. ``micro_batches[rank]`` lists that rank's micro-batch sizes."""

    effective_batch: int
    world_size: int
    micro_batch: int
    micro_batches: list[list[int]]
    precision: str
    checkpointing: str
    compile: bool
    sync: str
    reason: str
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Advice and observations, one sentence each."""
    predicted_peak_bytes: int | None = None
    """Peak memory that the weakest rank should show: measured at this size, or on the line of other sizes."""
    memory_budget_bytes: int | None = None
    """Peak memory that the plan may come to on the weakest rank: ``tune.memory_fraction`` of what was free."""

    def __post_init__(self) -> None:
        total = sum(map(sum, self.micro_batches))
        if total != self.effective_batch:  # a programmer's error: the arithmetic in batch.py forbids it
            raise AssertionError(f"plan sums to {total}, not to the effective batch {self.effective_batch}")

    @property
    def accumulation_steps(self) -> int:
        """K: micro-steps per optimizer step on the rank that has most."""
        return max(map(len, self.micro_batches))

    @property
    def shares(self) -> list[int]:
        """Samples of each rank in a full window; they differ by more than one where the ranks' speeds do."""
        return [sum(sizes) for sizes in self.micro_batches]

    @property
    def equation(self) -> str:
        """The split written out, e.g. ``512 = 2 ranks x 16 accumulation steps x 16``."""
        return batch.equation(self.effective_batch, self.micro_batches)

    @property
    def settings(self) -> StepSettings:
        """What the training core needs to know besides the split."""
        return StepSettings(self.precision, self.checkpointing, self.compile, self.sync)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``accumulation_steps`` and ``equation`` are included for readers."""
        derived = {"accumulation_steps": self.accumulation_steps, "equation": self.equation}
        return {**dataclasses.asdict(self), **derived}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_dict`; unknown keys (of a newer version) are ignored.

        Raises:
            ValueError: a type, a range, or a sum that no plan has; says which.
        """
        try:
            # a trial's loss may be infinite or no number: nothing depends on it
            found = codec.decode(cls, data, finite=False)
        except AssertionError as error:
            raise ValueError(str(error)) from error
        found._check_ranges()
        return found

    def _check_ranges(self) -> None:
        schema.at_least(1, effective_batch=self.effective_batch, micro_batch=self.micro_batch)
        schema.at_least(
            0,
            predicted_peak_bytes=self.predicted_peak_bytes,
            memory_budget_bytes=self.memory_budget_bytes,
        )
        if self.world_size != len(self.micro_batches):
            raise ValueError(
                f"world_size is {self.world_size}, with micro_batches of {len(self.micro_batches)}"
            )
        sizes = [size for rank in self.micro_batches for size in rank]
        if not all(1 <= size <= self.micro_batch for size in sizes):
            raise ValueError(f"micro_batches has sizes outside of 1 to {self.micro_batch}")
        self.settings.check()
        for trial in self.trials:
            StepSettings(trial.precision, trial.checkpointing, trial.compile, self.sync).check()
            schema.one_of((FITS, DOES_NOT_FIT, FAILED, SKIPPED), outcome=trial.outcome)
            schema.at_least(1, micro_batch=trial.micro_batch)
            times = ("micro_step_s", "reduce_s", "optimizer_s", "samples_per_s", "step_s", "confirmed_step_s")
            counts = ("peak_memory_bytes", "confirmed_steps")
            schema.at_least(0, **{name: getattr(trial, name) for name in (*times, *counts)})


def make_plan(
    *,
    effective_batch: int,
    world_size: int,
    micro_batch: int,
    precision: str,
    checkpointing: str,
    compile: bool,
    sync: str,
    reason: str,
    trials: list[Trial] | None = None,
    notes: list[str] | None = None,
    shares: Sequence[int] | None = None,
    predicted_peak_bytes: int | None = None,
    memory_budget_bytes: int | None = None,
) -> Plan:
    """Build the plan for a micro-batch; the split itself comes from `gatrain.batch`.

    Args:
        shares: samples of each rank where they are not to be equal.

    Raises:
        PlanError: the micro-batch is larger than a rank's share.
    """
    if shares is None:
        batch.check_micro_batch(effective_batch, world_size, micro_batch)
        shares = batch.rank_shares(effective_batch, world_size)
    return Plan(
        effective_batch=effective_batch,
        world_size=world_size,
        micro_batch=micro_batch,
        micro_batches=batch.split_shares(shares, micro_batch),
        precision=precision,
        checkpointing=checkpointing,
        compile=compile,
        sync=sync,
        reason=reason,
        trials=trials or [],
        notes=notes or [],
        predicted_peak_bytes=predicted_peak_bytes,
        memory_budget_bytes=memory_budget_bytes,
    )
