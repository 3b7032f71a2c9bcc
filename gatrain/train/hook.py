"""The door `hooks`: what sees a run from start to end. Subclass `Hook`, and override what is of interest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatrain.tasks.base import Task
from gatrain.train.records import StepRecord


@dataclass(frozen=True)
class HookRun:
    """The run that a hook sees, and what it may ask of it."""

    model: nn.Module
    task: Task
    effective_batch: int
    step: int
    """Steps done when this process started: 0 unless the run goes on."""
    total_steps: int
    rank: int
    world_size: int
    run_dir: Path
    trained: Mapping[str, Tensor]
    """Name of each trained parameter -> the tensor that the optimizer steps: the parameter itself, or the fp32
    weight of a 16-bit one."""
    evaluates: bool
    """Whether there is a held-out split."""
    stop: Callable[[str], None]
    """``stop(reason)`` ends the run as completed. Asked in `Hook.update` it ends after the next step, asked in
    `Hook.evaluated` at once. Any rank may ask."""
    keep: Callable[[str], None]
    """``keep(name)``, in `Hook.evaluated`: let the state of this step stay in the run folder's ``kept/name``,
    in the place of what was kept there before. ``save.keep`` does not touch it. Rank 0's word counts."""
    notice: Callable[[str], None]
    """Tell people something, on rank 0."""


@dataclass(frozen=True)
class TrainedStep:
    """An optimizer step whose update was made. Nothing in it has waited for the device."""

    model: nn.Module
    step: int
    """From 1: windows consumed."""
    updates: int
    """Updates made so far, this one included."""
    lr: float
    grad_norm: Tensor
    """Of the whole gradient before clipping: a scalar on the device, the same on every rank."""
    loss_sums: Mapping[str, Tensor]
    """This rank's summed loss of each term, on the device; over all ranks and divided by `weights`: the mean."""
    weights: Mapping[str, float]
    """Weight of each loss term over all ranks."""
    left_out: Tensor | None
    """On a GPU, for hooks without `Hook.needs_verdict`: above 0 where the update was left out after all, as a
    window was not finite. None where it is certain that it was made."""


class Hook:
    """Sees a run, may change its model, measure, and end it.

    Every rank makes the hook and calls its methods at the same places. So a hook may change the model, by the same
    change on every rank. It must not communicate (no collective, no barrier): a hook that waits for another rank
    hangs the run. An error in it ends the run after what was trained is saved.

    Gradients are off; a hook may compute some under ``torch.enable_grad()``, and what it leaves in ``.grad`` is
    dropped. What it draws at random follows from the run's seed, the hook and the step: the same on every rank, and
    after a resume. It may freeze parameters and change the mode of layers, which is saved and resumed; the model
    as a whole has to be left in the mode in which it came.
    """

    needs_verdict: bool = True
    """`update` is called for updates that were certainly made. For that the host waits for the device once a step
    on a GPU. False: no wait, and `TrainedStep.left_out` must be looked at on the device."""
    needs_part_norms: bool = False
    """Whether steps shall measure the gradient of parts of their windows: `StepRecord.parts`, for `measured`."""

    def device_bytes(self, model: nn.Module) -> int:
        """Device memory that the hook will hold, in bytes: trials hold as much, and the plan leaves room for it.

        Asked before `start`, and in trials, which make the hook and call nothing else of it.
        """
        return 0

    def start(self, run: HookRun) -> None:
        """The run begins, or goes on: model and optimizer are filled, and `load_state_dict` comes after this."""

    def update(self, step: TrainedStep) -> Mapping[str, Tensor | float] | None:
        """An update was made.

        Returns:
            Metrics of the step by name. Scalars on the device leave it with the other metrics: do not read them.
            Rank 0's are recorded.
        """
        return None

    def measured(self, record: StepRecord) -> Mapping[str, float] | None:
        """The numbers of a step are on the host: in order, several steps at once, skipped ones too, and before
        anything is saved. All but ``record.metrics`` is the same on every rank, so it may go into `state_dict`.

        Returns:
            Further metrics of the step.
        """
        return None

    def findings(self) -> Mapping[str, str]:
        """At the end, on rank 0: what was found out, in words, by a label of two words or so."""
        return {}

    def weights(self) -> Mapping[str, AbstractContextManager[Any]]:
        """Other weights that the model is evaluated with, beside its own: by name, a context in which the model has
        them. ``{"ema": ...}`` gives ``ema.loss`` and so on. Called before each evaluation."""
        return {}

    def exports(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Other weights that are written beside the model's in each saved state: by name, a state dict. Called on
        rank 0 alone."""
        return {}

    def evaluated(self, step: int, numbers: Mapping[str, Any]) -> None:
        """The held-out split was evaluated after this step; the numbers are the same on every rank."""

    def saved(self, step: int, path: Path) -> None:
        """A state was written. Called on rank 0 alone."""

    def end(self, step: int, completed: bool) -> None:
        """Training is over and saved."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a resume needs: nested mappings and lists of tensors, numbers and text. Rank 0's is saved, so it
        must be the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; tensors are on the host. Called on every rank."""
