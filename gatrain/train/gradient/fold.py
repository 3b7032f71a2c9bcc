"""Optimizer accumulation: each micro-batch's gradient goes into the optimizer's moments at once, and is freed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatrain import units
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.optimizer_config import AdamAConfig
from gatrain.optimizers import AdamA
from gatrain.tasks.base import Batch
from gatrain.train.gradient import GradientStrategy, refuse
from gatrain.train.main_gradients import gradient_bytes
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.parallel import Replicated

if TYPE_CHECKING:
    from gatrain.train.engine import Engine
    from gatrain.train.step import Step


class Fold(GradientStrategy):
    """What ``optimizer=adama`` asks for: a hook folds each parameter's gradient into `AdamA`'s moments.

    Across ranks the moments are added instead of gradients: rank 0 begins with those of the last step, the others
    with zeros, so that the sums are those of one process with all micro-batches.
    """

    exact = (
        "the first moment is Adam's of the whole window, for any loss that is a sum over samples; the second is "
        "the sum of the micro-gradients' squares, so it depends on the split"
    )
    holds_gradients = False
    keeps_state = False

    def __init__(self) -> None:
        self._step: Step | None = None
        self._optimizer: AdamA
        self._is_bare = True
        """Without a run's optimizer, as in verify: what the first moment has taken is left as the gradient."""
        self._hooks: list[RemovableHandle] = []
        self._folded: set[int] | None = None
        """Ids of the parameters that the backward in hand has reached; None outside of micro-steps."""

    # --- what does not go with it -------------------------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        if not isinstance(config.optimizer, AdamAConfig):
            raise ConfigError(
                "gradient=fold puts each micro-batch's gradient into Adam's moments and frees it: that is "
                f"optimizer=adama, and optimizer={config.optimizer.name} needs the whole gradient. Use "
                "optimizer=adama, or leave gradient=fold out."
            )
        optimizer = config.optimizer
        conflicts = [
            (
                str(optimizer.clips),
                optimizer.clips is not None,
                "clipping needs the gradient of the whole window before anything takes it",
                f"{str(optimizer.clips).partition('=')[0]}=null",
            ),
            (
                "precision=fp16",
                config.precision == "fp16",
                "the loss scale is found by computing windows again, and a window that was folded in part cannot "
                "be taken back",
                "precision=bf16",
            ),
            (
                "train.nonfinite=skip",
                config.train.nonfinite == "skip",
                "a window that is not finite is known as such once it is folded, and cannot be taken back",
                "train.nonfinite=stop",
            ),
            (
                "sync=overlap",
                config.sync == "overlap",
                "the moments are added over the ranks, not gradients in the last backward",
                "sync=window",
            ),
        ]
        refuse(conflicts, "optimizer=adama", "use optimizer=adamw")

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        if step.scaler is not None:
            raise ConfigError(
                "the model has fp16 parameters, whose loss scale is found by computing windows again, and "
                "optimizer=adama cannot take a window back that was folded in part. Use bf16 parameters, or "
                "optimizer=adamw."
            )
        assert isinstance(optimizer, AdamA)
        self._is_bare = False
        self._attach(step, optimizer)

    def notices(self, engine: Engine, micro_batches: int) -> list[str]:
        said = (
            "optimizer=adama adds the squares of each micro-batch's gradient where Adam squares their sum: with "
            f"the {micro_batches} micro-batches of this plan's windows its steps are up to sqrt({micro_batches}) = "
            f"{math.sqrt(micro_batches):.2g} times those of optimizer=adamw at the same rate, and another split is "
            "another optimizer"
        )
        return [
            said,
            "grad_norm is the root of the sum of the micro-gradients' squared norms: the window's gradient is "
            "never whole",
        ]

    def remarks(self, model: nn.Module) -> list[str]:
        sizes = gradient_bytes(model)
        saved = sum(sizes) - max(sizes)
        return [
            f"optimizer=adama keeps no gradient: {units.size(saved)} less (gradients of {units.size(sum(sizes))}, "
            f"but for the largest parameter's, {units.size(max(sizes))}). Code that is compiled as one piece gives "
            "its gradients at once, which takes that back.",
            "Its second moment is the sum of the squares of the micro-batches' gradients, not the square of their "
            "sum: steps are up to sqrt(accumulation steps x ranks) larger than those of optimizer=adamw.",
        ]

    # --- the window -----------------------------------------------------------------------------------------

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        if self._step is not step:
            self._attach(step, AdamA([*step.parallel.parameters], lr=0.0))
        if not self._is_bare:
            step.begin_update()  # what is folded cannot be taken back
        for k, batch in step.batches(window):
            step.seed(window, k)
            self.micro_step(step, batch)
            del batch

    def micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        with self._folding():
            step.forward_backward(batch, scale, last=last)

    def reduce(self, step: Step) -> None:
        optimizer = self._optimizer
        step.parallel.reduce_in_place_of_gradients(optimizer.moments, optimizer.begun.keys())
        if self._is_bare:
            for parameter in optimizer.begun.values():
                first = optimizer.param_groups[0]["betas"][0]
                parameter.grad = optimizer.moments(parameter)[0] / (1 - first)

    def clip(self, step: Step, clip: Callable[[Replicated], Tensor]) -> Tensor:
        return self._optimizer.norm()

    # --- hooks ------------------------------------------------------------------------------------------------

    def _attach(self, step: Step, optimizer: AdamA) -> None:
        """Fold the gradients of this step's model into this optimizer's moments."""
        self._step, self._optimizer = step, optimizer
        optimizer.holds_past = step.ranks.rank == 0
        for hook in self._hooks:
            hook.remove()
        # 16-bit parameters have moved their gradient into an fp32 one by then: that hook was registered before
        self._hooks = [
            owner.register_post_accumulate_grad_hook(self._hook(optimizer, trained))
            for owner, trained in zip(_trained(step.model), step.parallel.parameters, strict=True)
        ]

    def _hook(self, optimizer: AdamA, trained: nn.Parameter) -> Callable[[Tensor], None]:
        def fold(owner: Tensor) -> None:
            if self._folded is None:
                return  # a look at the model, not a window
            if id(trained) in self._folded:
                raise ExactnessError(
                    "a parameter got two gradients in one backward, as with reentrant checkpointing of a part that "
                    "is used twice: optimizer=adama would square each alone. Use use_reentrant=False, or "
                    "optimizer=adamw."
                )
            self._folded.add(id(trained))
            optimizer.fold(trained)

        return fold

    @contextlib.contextmanager
    def _folding(self) -> Iterator[None]:
        self._folded = set()
        try:
            yield
        finally:
            self._folded = None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
