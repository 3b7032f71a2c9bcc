"""The knobs of a step as rows of a table, and what of them a configuration leaves to trials.

The planner goes through the rows that are left open, in the order of the table: what costs least to try first. A
field of `gatrain.plan.StepSettings` has its row here; a person's own knob (`gatrain.train.knobs`) becomes a row
when the trial processes have said which values it has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gatrain.config import RunConfig
from gatrain.hardware import Hardware, choose_precision
from gatrain.plan import Plan, StepSettings
from gatrain.tune.curve import KnobOffer

DECIDED, FEW_SIZES, WHERE_MEMORY_LIMITS, FULL_STEPS = (
    "decided",
    "few sizes",
    "where memory limits",
    "full steps",
)
"""How trials find the best value: not at all; by a few sizes near the best one; by a curve of its own, where memory
forbids a larger micro-batch; by full steps alone."""


@dataclass(frozen=True)
class Row:
    """One knob."""

    name: str
    values: tuple[Any, ...]
    """From the simplest to what costs most; the first is measured first."""
    explored: str
    named: Callable[[Any], str]
    """A value beside another one, such as ``not compiled``."""
    described: Callable[[Any], str] = lambda value: ""
    """A value by itself; empty where it goes without saying."""
    is_simpler_first: bool = False
    """Whether an earlier value is taken where a later one is not clearly faster."""
    words: str = ""
    """What it changes, for a person's own."""

    def of(self, settings: StepSettings) -> Any:
        """The value that settings have."""
        return getattr(settings, self.name) if self in ROWS else settings.knobs.get(self.name)

    def set(self, settings: StepSettings, value: Any) -> StepSettings:
        """Settings with another value."""
        if self in ROWS:
            return dataclasses.replace(settings, **{self.name: value})
        others = {name: each for name, each in settings.knobs.items() if name != self.name}
        return dataclasses.replace(settings, knobs=others if value is None else {**others, self.name: value})


PRECISION = Row("precision", ("fp32", "bf16", "fp16"), DECIDED, str, str)
COMPILE = Row(
    "compile",
    (False, True),
    FEW_SIZES,  # compilation takes long: it is never tried along a whole curve
    lambda value: "compiled" if value else "not compiled",
    lambda value: "compiled" if value else "",
    is_simpler_first=True,
)
CHECKPOINTING = Row(
    "checkpointing",
    ("none", "selective", "full"),
    WHERE_MEMORY_LIMITS,
    lambda value: f"checkpointing {value}",
    lambda value: f"checkpointing {value}" if value != "none" else "",
    is_simpler_first=True,
)
SYNC = Row("sync", ("window", "overlap"), FULL_STEPS, lambda value: f"sync {value}")
ROWS = (PRECISION, COMPILE, CHECKPOINTING, SYNC)
"""In the order in which they are tried."""


def row_of(offer: KnobOffer) -> Row:
    """The row of a person's own knob; None stands for leaving it alone."""

    def named(value: Any) -> str:
        return f"{offer.name} left alone" if value is None else f"{offer.name}={value}"

    return Row(offer.name, (None, *offer.values), FEW_SIZES, named, words=offer.words)


def describe(settings: StepSettings) -> str:
    """Settings in words, such as ``bf16, checkpointing full, compiled``."""
    parts = [row.described(row.of(settings)) for row in (PRECISION, CHECKPOINTING, COMPILE)]
    return ", ".join([*filter(None, parts), *([settings.knob_text] if settings.knobs else [])])


def differences(settings: StepSettings, other: StepSettings) -> list[str]:
    """What tells settings from others, in words."""
    found = [
        row.named(row.of(settings))
        for row in (SYNC, CHECKPOINTING, COMPILE)
        if row.of(settings) != row.of(other)
    ]
    if settings.knobs != other.knobs:
        found.append(settings.knob_text or "knobs left alone")
    return found


def simplicity(settings: StepSettings) -> tuple[int, ...]:
    """Sorts the simpler settings first."""
    return (
        *(row.values.index(row.of(settings)) for row in ROWS if row.is_simpler_first),
        len(settings.knobs),
    )


@dataclass(frozen=True)
class SearchSpace:
    """What the config leaves to the tuner, with everything resolved that needs no measurement."""

    base: StepSettings
    """What to measure first: no checkpointing and no compilation unless they were asked for."""
    precision_reason: str
    open: tuple[Row, ...]
    """The rows that are left to trials, in the order in which they are tried."""
    fixed_micro_batch: int | None
    has_knobs: bool = False
    """Whether the run has further knobs."""

    @property
    def may_compile(self) -> bool:
        """Whether any trial may compile."""
        return COMPILE in self.open or self.base.compile

    @property
    def needs_trials(self) -> bool:
        """Whether anything is left that only a measurement can decide."""
        return self.fixed_micro_batch is None or self.has_knobs or any(row is not SYNC for row in self.open)


def search_space(config: RunConfig, hardware: Hardware) -> SearchSpace:
    """Read the config's ``auto`` values.

    On a CPU a fixed micro-batch leaves nothing to measure: without a hard memory limit there is nothing that
    checkpointing could buy, and ``compile=auto`` means no.
    """
    precision, reason = choose_precision(config, hardware)
    fixed = None if config.batch.micro == "auto" else int(config.batch.micro)
    on_gpu = hardware.device == "cuda"
    is_open = {
        COMPILE: config.compile == "auto" and on_gpu and can_compile(),
        CHECKPOINTING: config.checkpointing == "auto" and (on_gpu or fixed is None),
        SYNC: config.sync == "auto",
    }
    asked = {row: getattr(config, row.name) for row in is_open}
    base = {row.name: row.values[0] if value == "auto" else value for row, value in asked.items()}
    return SearchSpace(
        base=StepSettings(precision=precision, **base),
        precision_reason=reason,
        open=tuple(row for row in ROWS if is_open.get(row, False)),
        fixed_micro_batch=fixed,
        has_knobs=bool(config.knobs),
    )


def half_note(half_parameters: int, half_dtypes: str, parameters: int) -> str:
    """What the plan says of trained 16-bit parameters."""
    which = "All" if half_parameters == parameters else f"{half_parameters:,} of"
    return (
        f"{which} {parameters:,} parameters are {half_dtypes}: their gradients are summed in fp32 over micro-steps "
        "and ranks, and the optimizer steps fp32 master weights, which are rounded into them after each step."
    )


def can_compile() -> bool:
    """Whether torch.compile can make GPU kernels here: it needs Triton."""
    return importlib.util.find_spec("triton") is not None


def norm_note(batch_norms: Sequence[str], plan: Plan, synchronises: bool = False) -> str | None:
    """What BatchNorm means for a plan with several micro-batches; None where it sees the whole batch at once."""
    pieces = max(map(len, plan.micro_batches)) if synchronises else sum(map(len, plan.micro_batches))
    if not batch_norms or pieces == 1:
        return None
    more = f" and {len(batch_norms) - 1} more" if len(batch_norms) > 1 else ""
    sizes = sorted({size for rank in plan.micro_batches for size in rank})
    which = f"({' or '.join(map(str, sizes))} samples{' of each rank' if synchronises else ''})"
    return (
        f"BatchNorm ('{batch_norms[0]}'{more}) normalises each micro-batch {which} by itself, so the result "
        "depends on the split; GroupNorm or frozen BatchNorm would not."
    )
