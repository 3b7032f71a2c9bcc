"""Which ways of computing a micro-step are in question: fixed by the config, implied, or to be measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from gatrain.config import RunConfig
from gatrain.hardware import Hardware, choose_precision
from gatrain.plan import Plan, StepSettings


@dataclass(frozen=True)
class Question:
    """What the config asks of the tuner, with everything resolved that needs no measurement."""

    base: StepSettings
    """What to measure first: no checkpointing and no compilation unless they were asked for."""
    precision_reason: str
    tries_checkpointing: bool
    """``checkpointing=auto``: the other modes count if memory is what limits the micro-batch."""
    tries_compile: bool
    """``compile=auto`` where compiled kernels can be had."""
    fixed_micro_batch: int | None
    tries_overlap: bool = False
    """``sync=auto``: on several GPUs the overlapped reduction is compared as well."""

    @property
    def may_compile(self) -> bool:
        """Whether any trial may compile."""
        return self.tries_compile or self.base.compile

    @property
    def needs_trials(self) -> bool:
        """Whether anything is left that only a measurement can decide."""
        return self.fixed_micro_batch is None or self.tries_checkpointing or self.tries_compile


def resolve(config: RunConfig, hardware: Hardware) -> Question:
    """Read the config's ``auto`` values.

    On a CPU a fixed micro-batch leaves nothing to measure: without a hard memory limit there is nothing that
    checkpointing could buy, and ``compile=auto`` means no.
    """
    precision, reason = choose_precision(config, hardware)
    fixed = None if config.batch.micro == "auto" else int(config.batch.micro)
    on_gpu = hardware.device == "cuda"
    return Question(
        base=StepSettings(
            precision=precision,
            checkpointing="none" if config.checkpointing == "auto" else config.checkpointing,
            compile=False if config.compile == "auto" else bool(config.compile),
            sync="window" if config.sync == "auto" else config.sync,
        ),
        precision_reason=reason,
        tries_checkpointing=config.checkpointing == "auto" and (on_gpu or fixed is None),
        tries_compile=config.compile == "auto" and on_gpu and can_compile(),
        fixed_micro_batch=fixed,
        tries_overlap=config.sync == "auto",
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


def describe(settings: StepSettings) -> str:
    """Settings in words, such as ``bf16, checkpointing full, compiled``."""
    parts = [settings.precision]
    if settings.checkpointing != "none":
        parts.append(f"checkpointing {settings.checkpointing}")
    if settings.compile:
        parts.append("compiled")
    return ", ".join(parts)


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
