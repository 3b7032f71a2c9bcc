"""What the training loop tells the world, and the shape of a listener. Listeners never touch the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gatrain.train.records import RunSummary, StepRecord


@dataclass(frozen=True)
class RunInfo:
    """Facts of a run that do not change while it runs."""

    recipe: str
    run_dir: Path
    device: str
    """For people, such as ``2 x NVIDIA H100 80GB HBM3`` or ``CPU (2 threads)``."""
    world_size: int
    effective_batch: int
    equation: str
    precision: str
    checkpointing: str
    compile: bool | str
    """As in `gatrain.plan.StepSettings`."""
    sync: str
    parameters: int
    train_samples: int
    eval_samples: int
    first_step: int
    """Steps already done when this process started (0 unless resumed)."""
    total_steps: int
    steps_per_epoch: int
    baseline_name: str | None = None
    baseline_loss: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value of the configuration, secrets hidden."""
    stages: tuple[tuple[int, str], ...] = ()
    """(steps done when it begins, its split as an equation) of each stage, where the effective batch changes."""
    half_dtypes: str = ""
    """Of trained parameters with fp32 main gradients and master weights: ``bf16``, say."""


@runtime_checkable
class Sink(Protocol):
    """A listener of the training loop, on rank 0 only. Called on the host, outside the hot path."""

    def start(self, info: RunInfo) -> None: ...

    def step(self, record: StepRecord) -> None:
        """The numbers of one step. Several arrive at once, in order, when the metrics leave the device."""

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of the held-out split after ``step`` by name: ``loss``, where any sample has a weight, and
        the task's metrics; with several loss terms also ``loss_terms``, the mean of each by name."""

    def saved(self, step: int, path: Path) -> None: ...

    def notice(self, text: str) -> None:
        """Something a person should know, such as a short last window or a save that failed."""

    def end(self, summary: RunSummary) -> None:
        """The run is over."""
