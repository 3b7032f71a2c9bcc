"""The plan: the chosen split with its reasons and all trials. Plain data that survives JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gatrain import codec, schema
from gatrain.batch import Split
from gatrain.config import CHECKPOINTING, PRECISIONS, REDUCE_OVERHEAD, SYNCS

FITS, DOES_NOT_FIT, FAILED, SKIPPED = "fits", "does_not_fit", "failed", "skipped"


@dataclass(frozen=True)
class StepSettings:
    """How one micro-step is computed, apart from its size. No value is ``auto``."""

    precision: str
    checkpointing: str
    compile: bool | str
    """True, False, or ``reduce-overhead``: compiled, and replayed as CUDA graphs."""
    sync: str
    knobs: Mapping[str, bool | int | float | str] = field(default_factory=dict, hash=False)
    """Values of further knobs (`gatrain.knob`) by their names; one that is not named is left alone."""

    @property
    def knob_text(self) -> str:
        """The further knobs, such as ``attention=flash``; empty where there are none."""
        return ", ".join(f"{name}={value}" for name, value in sorted(self.knobs.items()))

    @property
    def compile_text(self) -> str:
        """How it is compiled, for people."""
        return compile_text(self.compile)

    def check(self) -> None:
        """
        Raises:
            ValueError: names the value that is none of those allowed.
        """
        if not isinstance(self.compile, bool):
            schema.one_of((REDUCE_OVERHEAD,), compile=self.compile)
        schema.one_of(PRECISIONS[1:], precision=self.precision)
        schema.one_of(CHECKPOINTING[1:], checkpointing=self.checkpointing)
        schema.one_of(SYNCS[1:], sync=self.sync)


def compile_text(value: bool | str) -> str:
    """A value of ``compile``, for people."""
    if value == REDUCE_OVERHEAD:
        return "compiled with CUDA graphs"
    return "compiled" if value else "not compiled"


@dataclass(frozen=True)
class MadeFor:
    """The model and the data that a plan is for: ranks, which make both anew, compare (`gatrain.outdated`)."""

    parameters: int
    samples: int
    eval_samples: int
    is_remembered: bool = False
    """Known from an earlier inspection: nobody has looked at model and data for this run before its ranks do."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a count below 0.
        """
        schema.at_least(0, parameters=self.parameters, samples=self.samples, eval_samples=self.eval_samples)


@dataclass(frozen=True)
class Measurement:
    """One micro-batch size, measured on all ranks: the slowest rank's seconds, the largest peak in bytes.

    ``outcome`` is one of ``fits``, ``does_not_fit``, ``failed`` (with ``error``) and ``skipped`` (predicted not to
    fit, or out of time; ``error`` says which). None where not measured.
    """

    micro_batch: int
    outcome: str
    peak_memory_bytes: int | None = None
    micro_step_s: float | None = None
    reduce_s: float | None = None
    optimizer_s: float | None = None
    loss: float | None = None
    """Loss per unit weight of one fixed sample, repeated ``micro_batch`` times."""
    reference_loss: float | None = None
    """The same of the smallest size that this process measured."""
    loss_noise: float = 0.0
    """Standard deviation of ``reference_loss`` over random seeds: above zero where there is dropout."""
    repeated_loss: float | None = None
    """``loss`` once more with the same seed, where it disagrees with the reference."""
    error: str | None = None
    rank_s: tuple[float, ...] = ()
    """Each rank's own ``micro_step_s``, in rank order."""
    fragmentation_bytes: int = 0
    """Part of the peak that no tensor filled."""
    compile_s: float | None = None
    """Seconds of the first micro-step of this size, compilation included, on the slowest rank."""
    is_estimate: bool = False
    """Not measured: see `gatrain.tune.search.extended`."""
    noise: float | None = None
    """Relative standard error of ``micro_step_s``, from the spread of the repeats on the noisiest rank."""
    host_s: float | None = None
    """Seconds in which the host hands a micro-step to a GPU; near ``micro_step_s`` where the GPU waits for it."""
    host_bytes: int | None = None
    """Main memory of one micro-batch before it goes to the device."""
    spread: float | None = None
    """Part by which repeats differ on that rank, and their fastest and slowest."""
    range_s: tuple[float, float] | None = None
    again: int = 0
    """How often the size was measured again, because its repeats differ or other sizes contradict it."""

    def with_repeat(self, other: Measurement) -> Measurement:
        """This size measured again: the faster counts, as whatever disturbs only adds; a failure always counts."""
        if other.outcome != FITS or self.micro_step_s is None or other.micro_step_s is None:
            return other
        kept = min(self, other, key=lambda m: m.micro_step_s or 0.0)
        ranges = [m.range_s for m in (self, other) if m.range_s is not None]
        return dataclasses.replace(
            kept,
            peak_memory_bytes=max(self.peak_memory_bytes or 0, other.peak_memory_bytes or 0) or None,
            fragmentation_bytes=max(self.fragmentation_bytes, other.fragmentation_bytes),
            compile_s=max(self.compile_s or 0.0, other.compile_s or 0.0),
            range_s=(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
            again=self.again + 1,
        )

    def check(self) -> None:
        """
        Raises:
            ValueError: a number that was never measured.
        """
        schema.one_of((FITS, DOES_NOT_FIT, FAILED, SKIPPED), outcome=self.outcome)
        schema.at_least(1, micro_batch=self.micro_batch)
        names = (
            "peak_memory_bytes", "micro_step_s", "reduce_s", "optimizer_s", "fragmentation_bytes", "compile_s",
            "host_bytes", "again",
        )  # fmt: skip
        schema.at_least(0, **{name: getattr(self, name) for name in names})
        for seconds in (*self.rank_s, *(self.range_s or ())):
            schema.at_least(0, seconds=seconds)


@dataclass(frozen=True)
class Trial:
    """One measured size, how it was computed, and what it means for the plan's effective batch."""

    settings: StepSettings = field(metadata=codec.INLINE)
    measured: Measurement = field(metadata=codec.INLINE)
    samples_per_s: float | None = None
    """Samples per second over all ranks, full optimizer steps included."""
    step_s: float | None = None
    """Modelled seconds of one optimizer step at the effective batch with this micro-batch."""
    confirmed_step_s: float | None = None
    """Median seconds of full optimizer steps at the effective batch (all micro-steps, the
    reduction, the update), timed in turn with the other finalists; None for all but finalists."""
    confirmed_steps: int | None = None
    """Full steps behind that median."""

    @property
    def micro_batch(self) -> int:
        return self.measured.micro_batch

    @property
    def outcome(self) -> str:
        return self.measured.outcome

    @property
    def error(self) -> str | None:
        return self.measured.error

    @property
    def peak_memory_bytes(self) -> int | None:
        return self.measured.peak_memory_bytes

    def check(self) -> None:
        """
        Raises:
            ValueError: a number that was never measured.
        """
        names = ("samples_per_s", "step_s", "confirmed_step_s", "confirmed_steps")
        schema.at_least(0, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Stage:
    """How the effective batch of one stage is computed, where it changes over the run."""

    begins: str
    """``after 1,000 steps``, say; empty for the first."""
    split: Split = field(metadata=codec.INLINE)
    micro_batch: int

    @property
    def equation(self) -> str:
        return self.split.equation(self.micro_batch)

    def check(self) -> None:
        """
        Raises:
            ValueError: a micro-batch that its split cannot have.
        """
        schema.at_least(1, micro_batch=self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one effective batch is computed: the split, the micro-batch that cuts it, and the settings of a step."""

    split: Split = field(metadata=codec.INLINE)
    micro_batch: int
    settings: StepSettings = field(metadata=codec.INLINE)
    reason: str
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Observations, one sentence each."""
    advice: list[str] = field(default_factory=list)
    """What else could be asked for, one sentence each; nothing of it changes the plan."""
    predicted_peak_bytes: int | None = None
    """Peak memory that the weakest rank should show: measured at this size, or on the line of other sizes."""
    memory_budget_bytes: int | None = None
    """Peak memory that the plan may come to on the weakest rank: ``tune.memory_fraction`` of what was free."""
    made_for: MadeFor | None = None
    """None in plans of earlier versions."""
    stages: list[Stage] = field(default_factory=list)
    """Each stage of an effective batch that changes; the rest of the plan is of the largest. Empty where it does
    not."""

    @property
    def effective_batch(self) -> int:
        return self.split.effective_batch

    @property
    def world_size(self) -> int:
        return self.split.world_size

    @property
    def micro_batches(self) -> list[list[int]]:
        """``micro_batches[rank]`` lists that rank's micro-batch sizes."""
        return self.split.sizes(self.micro_batch)

    @property
    def accumulation_steps(self) -> int:
        """K: micro-steps per optimizer step on the rank that has most."""
        return self.split.accumulation_steps(self.micro_batch)

    @property
    def equation(self) -> str:
        """The split written out, e.g. ``512 = 2 ranks x 16 accumulation steps x 16``."""
        return self.split.equation(self.micro_batch)

    def check(self) -> None:
        """
        Raises:
            ValueError: a range that no plan has.
        """
        schema.at_least(1, micro_batch=self.micro_batch)
        schema.at_least(
            0, predicted_peak_bytes=self.predicted_peak_bytes, memory_budget_bytes=self.memory_budget_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with what follows from it included for readers."""
        derived = {
            "micro_batches": self.micro_batches,
            "accumulation_steps": self.accumulation_steps,
            "equation": self.equation,
        }
        return {**codec.encode(self), **derived}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of `to_dict`; unknown keys (of a newer version) are ignored.

        Raises:
            ValueError: a type, a range, or a sum that no plan has; says which.
        """
        if not isinstance(data, dict) or "micro_batches" not in data:
            raise ValueError("micro_batches is missing")
        sizes = codec.decode(list[list[int]], data["micro_batches"])
        if data.get("world_size") != len(sizes):
            raise ValueError(f"world_size is not {len(sizes)}, the number of lists in micro_batches")
        # plans of earlier versions hold no shares, but the micro-batches that add up to them, and one sync for all
        upgraded = {"shares": [sum(rank) for rank in sizes], **data}
        if isinstance(data.get("trials"), list):
            same = {"sync": data.get("sync")}
            upgraded["trials"] = [same | each if isinstance(each, dict) else each for each in data["trials"]]
        # a trial's loss may be infinite or no number: nothing depends on it
        found = codec.decode(cls, upgraded, finite=False)
        steps = [
            -(-share // found.micro_batch) for share in found.split.shares
        ]  # before any list so long is made
        if steps != list(map(len, sizes)) or found.micro_batches != sizes:
            raise ValueError(
                f"micro_batches is not how a micro-batch of {found.micro_batch} cuts {found.split}"
            )
        return found
