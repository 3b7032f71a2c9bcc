"""The knobs of a step as rows of a table, and what of them a configuration leaves to trials.

The planner goes through the rows that are left open, in the order of the table: what costs least to try first. A
field of `gatrain.plan.StepSettings` has its row here; a person's own knob (`gatrain.train.knobs`) becomes a row
when the trial processes have said which values it has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gatrain import doors
from gatrain.batch import Split, typical_samples
from gatrain.config import CHECKPOINTING as CHECKPOINTING_MODES
from gatrain.config import REDUCE_OVERHEAD, RunConfig
from gatrain.hardware import Hardware, choose_precision
from gatrain.inspected import Inspected
from gatrain.launch.world import Nodes
from gatrain.plan import StepSettings, compile_text
from gatrain.tune.curve import KnobOffer
from gatrain.tune.estimate import check_state_fits, memory_per_rank

USUAL = {"gradient": doors.SHIPPED["gradient"]["plain"], "dropout": doors.SHIPPED["dropout"]["torch"]}
"""Parts that CUDA graphs are tried with by themselves."""
MAX_SECONDS = {"cpu": 30.0, "cuda": 120.0}
"""Time for trials where ``tune.max_seconds`` is null."""
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
    (False, True, REDUCE_OVERHEAD),
    FEW_SIZES,  # compilation takes long: it is never tried along a whole curve
    compile_text,
    lambda value: compile_text(value) if value else "",
    is_simpler_first=True,
)
CHECKPOINTING = Row(
    "checkpointing",
    CHECKPOINTING_MODES[1:],
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
    """What the config leaves to the tuner on one world, with everything resolved that needs no measurement."""

    config: RunConfig
    hardware: Hardware
    local_ranks: int
    """Of this machine; every node is taken to be like it."""
    split: Split
    base: StepSettings
    """What to measure first: no checkpointing and no compilation unless they were asked for."""
    precision_reason: str
    open: tuple[Row, ...]
    """The rows that are left to trials, in the order in which they are tried."""
    fixed_micro_batch: int | None
    max_seconds: float
    """Time for trials."""
    state_bytes: int = 0
    """What parameters, gradients and optimizer state take of it at every micro-batch, once the model is known."""

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return self.hardware.device

    @property
    def free_bytes(self) -> int:
        """Memory that the weakest rank can take."""
        return memory_per_rank(self.hardware, self.local_ranks)

    @property
    def allowed_bytes(self) -> int:
        """Memory that a plan may use now."""
        return int(self.free_bytes * self.config.tune.memory_fraction)

    @property
    def checks_loss(self) -> bool:
        """Whether a loss that depends on the micro-batch is refused."""
        return self.config.train.check == "error"

    @property
    def has_plain_batch(self) -> bool:
        """Whether the effective batch is one number of samples, by no rule."""
        batch = self.config.batch
        return batch.stages.is_constant and not batch.counts_tokens and batch.rule == "none"

    @property
    def sizes(self) -> list[int]:
        """Micro-batches worth measuring, rising."""
        return self.split.candidates() if self.fixed_micro_batch is None else [self.fixed_micro_batch]

    @property
    def may_compile(self) -> bool:
        """Whether any trial may compile."""
        return COMPILE in self.open or bool(self.base.compile)

    @property
    def may_replay(self) -> bool:
        """Whether trials may try CUDA graphs by themselves: where each backward follows its forward, with torch's
        own dropout, on one GPU and without a loss scale. Elsewhere they have not been measured."""
        config = self.config
        as_usual = {"gradient": config.gradient, "dropout": config.dropout}
        is_usual = all(doors.node_of(key, each)["_target_"] == USUAL[key] for key, each in as_usual.items())
        is_usual = is_usual and self.split.world_size == 1 and self.base.precision != "fp16"
        return config.compile == "auto" and config.optimizer.gradient is None and is_usual

    @property
    def overlaps(self) -> bool:
        """Whether the overlapped reduction is compared: on several GPUs, unless it was asked for."""
        return self.device == "cuda" and self.split.world_size > 1 and SYNC in self.open

    @property
    def needs_trials(self) -> bool:
        """Whether anything is left that only a measurement can decide."""
        is_open = any(row is not SYNC for row in self.open)
        return self.fixed_micro_batch is None or bool(self.config.knobs) or is_open


def search_space(config: RunConfig, hardware: Hardware, nodes: Nodes) -> SearchSpace:
    """Read the config's ``auto`` values.

    On a CPU a fixed micro-batch leaves nothing to measure: without a hard memory limit there is nothing that
    checkpointing could buy, and ``compile=auto`` means no.
    """
    precision, reason = choose_precision(config, hardware)
    fixed = None if config.batch.micro == "auto" else int(config.batch.micro)
    on_gpu = hardware.device == "cuda"
    is_free = doors.node_of("norm", config.norm)["_target_"] not in doors.AS_WRITTEN
    is_open = {
        COMPILE: config.compile == "auto" and on_gpu and can_compile() and is_free,
        CHECKPOINTING: config.checkpointing == "auto" and (on_gpu or fixed is None) and is_free,
        SYNC: config.sync == "auto",
    }
    asked = {row: getattr(config, row.name) for row in is_open}
    base = {row.name: row.values[0] if value == "auto" else value for row, value in asked.items()}
    return SearchSpace(
        config=config,
        hardware=hardware,
        local_ranks=nodes.nproc,
        split=Split(config.batch.largest, nodes.world_size),
        base=StepSettings(precision=precision, **base),
        precision_reason=reason,
        open=tuple(row for row in ROWS if is_open.get(row, False)),
        fixed_micro_batch=fixed,
        max_seconds=config.tune.max_seconds or MAX_SECONDS[hardware.device],
    )


def for_model(space: SearchSpace, found: Inspected) -> SearchSpace:
    """What is left of a space for this model and its data: a window that is counted in tokens has the samples that
    so many tokens are on average, or a fixed micro-batch of each rank, if that is more.

    Raises:
        PlanError: a fixed micro-batch exceeds a rank's share.
        DoesNotFitError: the model does not fit in memory, whatever the micro-batch.
    """
    split, fixed, batch = space.split, space.fixed_micro_batch, space.config.batch
    if batch.counts_tokens:
        samples = typical_samples(batch.largest, found.mean_tokens, found.samples)
        split = Split(max(samples, (fixed or 0) * split.world_size), split.world_size)
    if fixed is not None:
        split.check_micro_batch(fixed)
    state_bytes = check_state_fits(space.config, found, space.hardware, space.local_ranks)
    return dataclasses.replace(space, split=split, state_bytes=state_bytes)


def can_compile() -> bool:
    """Whether torch.compile can make GPU kernels here: it needs Triton."""
    return importlib.util.find_spec("triton") is not None
