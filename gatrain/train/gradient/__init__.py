"""The door `gradient`: ways from a window to its gradient, each a file that the step does not know.

``gradient: plain`` is a backward for each micro-batch; ``cached`` is for a loss of all samples of a window. Another
one is a class of one's own, named by ``gradient._target_`` and written from the means that
`gatrain.train.step.Step` has: a strategy decides which passes are made and in which order; the step decides how a
pass is computed, reduced and applied.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gatrain.config import RunConfig
from gatrain.errors import ConfigError
from gatrain.tasks.base import Batch
from gatrain.train.micro_batches import LoadedWindow

if TYPE_CHECKING:
    from gatrain.train.engine import Engine
    from gatrain.train.parallel import Replicated
    from gatrain.train.step import Step


@dataclass(frozen=True)
class StepCost:
    """What a strategy computes for each micro-batch of a window: what the tuner reckons step times with."""

    micro_steps: float = 1.0
    """Passes forward and backward."""
    forwards: float = 0.0
    """Passes forward only."""

    @property
    def in_micro_steps(self) -> float:
        """All of it as passes forward and backward: a backward takes about two forwards."""
        return self.micro_steps + self.forwards / 3


@dataclass(frozen=True)
class Update:
    """An update that was made, or left out."""

    norm: Tensor
    """L2 norm of the reduced gradient before clipping: a scalar on the device, the same on every rank."""
    made: bool
    """False where it was left out because the gradient or the loss is not finite; True too where only the device
    knows as yet."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Further numbers of the step, by name: scalars on the device leave it with the other metrics."""


def refuse(conflicts: Iterable[tuple[str, bool, str, str]], what: str, way_out: str) -> None:
    """Refuse the first setting that a strategy does not go with.

    Args:
        conflicts: the setting as it was typed, whether it is so, why that does not go, and what to type instead.
        what: the setting that stands for the strategy.
        way_out: what to do without it.

    Raises:
        ConfigError: what was given, why it does not go with ``what``, and what to write instead.
    """
    for given, is_so, why, instead in conflicts:
        if is_so:
            raise ConfigError(f"{given} and {what} exclude each other: {why}. Write {instead}, or {way_out}.")


class GradientStrategy(abc.ABC):
    """A way from a window to its gradient. Subclass it; ``gradient._target_`` names the subclass.

    Every rank calls it for the same windows, each with micro-batches of its own, or with none at all.
    """

    exact: str = "what its author says: the class has no sentence `exact`"
    """One sentence: what the gradient is equal to, and for which losses and models."""
    changes_gradient: bool = False
    """Whether it gives on purpose another gradient than that of the loss (sharpness-aware, noisy, projected). Then
    `gatrain verify` compares splits with its own gradient of the window in one piece."""
    needs_whole_window: bool = False
    """Whether the first backward needs every micro-batch of the window."""
    needs_sum_over_samples: bool = True
    """Whether only a loss that is a sum over samples is exact: then that is checked before the first step."""
    overlaps: bool = False
    """Whether its last backward on every rank is `Step.backward` with ``last``: then ``sync=overlap`` may start to
    reduce in it. Otherwise gradients are reduced after it, whatever ``sync`` says."""
    evaluates_windows: bool = False
    """Whether held-out samples are evaluated in windows (`gatrain.train.window_evaluation`), not one by one."""
    adds_micro_batches: bool = False
    """Whether after each `Step.forward_backward` ``.grad`` is the sum over the samples so far, each independent of
    the others: then the noise of the gradient can be measured from a part of the window."""
    trains_phases: bool = False
    """Whether it is for tasks with several phases (`Task.phases`), and for those alone."""
    normalises_window: bool = False
    """Whether BatchNorm layers see all samples of the window, so that no micro-batch is too small for them. Then
    `gatrain verify` compares the running statistics, too."""
    cost: StepCost = StepCost()
    """Where it depends on the model, see `cost_of`."""
    holds_gradients: bool = True
    """Whether the gradients of all parameters are in memory at once, between micro-steps and at the update."""
    keeps_state: bool = True
    """Whether parameters and optimizer are as before the window until its update. Otherwise a window that fails or
    is not finite ends the run, and what is saved is the state of an earlier step."""

    def check(self, config: RunConfig) -> None:  # noqa: B027
        """Look at the whole configuration before anything runs.

        Raises:
            ConfigError: what does not go with this strategy, why, and what to write instead.
        """

    def cost_of(self, model: nn.Module) -> StepCost:
        """`cost`, for this model."""
        return self.cost

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Look at the model, the optimizer and the ranks, once, before the first window. All ranks call it; for the
        library form and for verify, which have no optimizer, nobody does.

        Raises:
            ConfigError: as `check`, for what only these show.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """What later windows need of earlier ones, for a resume: nested mappings and lists of tensors, numbers and
        text. Rank 0's is saved, so it must be the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` gave; tensors are on the host. Called on every rank, after `set_up`."""

    def passes(self, step: Step) -> Mapping[str, int]:
        """How often each loss term of the window in hand is computed, where that is not once. The same on every
        rank. 0: not at all, so that it has no T."""
        return {}

    def notices(self, engine: Engine, micro_batches: int) -> list[str]:
        """What a person should know before the first step, a sentence each.

        Args:
            micro_batches: of a whole window, over all ranks.
        """
        return []

    def news(self) -> list[str]:
        """What a person should know since the last call, a sentence each. It may wait for the device."""
        return []

    def sum_to_check(self, step: Step) -> Callable[[Batch], Tensor] | None:
        """What must be a sum over samples where the loss need not be (`needs_sum_over_samples`): a scalar of a
        batch on the device, checked before the first step as the loss is otherwise. None: nothing is checked."""
        return None

    def remarks(self, model: nn.Module) -> list[str]:
        """Sentences for the plan. The model's values do not matter."""
        return []

    @abc.abstractmethod
    def __call__(self, window: LoadedWindow, step: Step) -> Update | None:
        """Add this rank's part of the window's gradient to the ``.grad`` of the parameters.

        With the means of ``step``, above all:

        - ``step.batches(window)``: index and batch on the device, one after the other, any number of times;
        - ``step.seed(window, k)``: the random numbers of micro-step k, the same at each call;
        - ``step.forward_backward(batch)``: one micro-batch's share, by the task's ``loss_sum``;
        - ``step.method(name)``: a method ``(model, batch)`` of the task as a function of the batch, compiled where
          the run is; with ``step.autocast()``, ``step.parallel.micro_step()`` and ``step.backward(scalar)``: other
          passes;
        - ``step.scale``: 1/T of each loss term; ``step.counts.add(terms)`` for losses that it computes itself;
        - ``step.parallel.gather(tensor)``, ``gather_nested(rows)``, ``agree(flag)``: the only collectives; all
          ranks call them in one order;
        - ``step.reset()``: forget what the window has come to so far.

        Returns:
            None: `reduce` and the update follow. An `Update` where the strategy has made both itself (with
            ``step.parallel.reduce`` and ``step.update``, or in its own way): the step then leaves it at that.
        """

    def micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        """One micro-batch forward and backward with what the strategy does of its gradients: trials time it too."""
        step.forward_backward(batch, scale, last=last)

    def reduce(self, step: Step) -> None:
        """Add over the ranks what the micro-steps have left, after they agreed that nobody failed. Collective."""
        step.parallel.reduce()

    def clip(self, step: Step, clip: Callable[[Replicated], Tensor]) -> Tensor:
        """Clip the reduced gradient by ``clip``; gives its norm before: a scalar, the same on every rank."""
        return clip(step.parallel)
