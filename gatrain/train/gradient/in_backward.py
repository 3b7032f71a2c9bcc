"""Optimizer in backward: each parameter is updated as its gradient appears, which is freed at once. For K = 1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatrain import units
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.tasks.base import Batch
from gatrain.train.gradient import GradientStrategy, Update, refuse
from gatrain.train.main_gradients import gradient_bytes
from gatrain.train.micro_batches import LoadedWindow

if TYPE_CHECKING:
    from gatrain.train.step import Step


class InBackward(GradientStrategy):
    """A window of one micro-batch on one rank: a hook steps each parameter alone, to the same bits."""

    exact = (
        "the update of the whole window, which is one micro-batch, for any loss that is a sum over samples"
    )
    holds_gradients = False
    keeps_state = False

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._group_of: dict[int, dict[str, Any]] = {}
        self._hooks: list[RemovableHandle] = []
        self._norms: dict[int, Tensor] | None = None
        """Of the gradients that the backward in hand has given; None outside of micro-steps."""

    # --- what does not go with it -------------------------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        optimizer, batch = config.optimizer, config.batch
        conflicts = [
            (
                str(optimizer.clips),
                optimizer.clips is not None,
                "clipping needs the whole gradient before anything is updated",
                f"{str(optimizer.clips).partition('=')[0]}=null",
            ),
            (
                "precision=fp16",
                config.precision == "fp16",
                "a window that overflows is computed again, and one that was updated in part cannot be",
                "precision=bf16",
            ),
            (
                "train.nonfinite=skip",
                config.train.nonfinite == "skip",
                "a window is known not to be finite once some of its updates are made",
                "train.nonfinite=stop",
            ),
            (
                f"batch.micro={batch.micro}",
                batch.micro != batch.largest,
                "with more than one micro-step a gradient is not complete in a backward",
                f"batch.micro={batch.largest}",
            ),
            (
                f"optimizer._target_={(optimizer.node or {}).get('_target_')}",
                optimizer.node is not None,
                "only shipped optimizers are known to step each parameter by itself",
                "optimizer=adamw",
            ),
        ]
        refuse(conflicts, "gradient=in_backward", "leave gradient=in_backward out")

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        if step.ranks.world_size > 1:
            raise ConfigError(
                f"gradient=in_backward is for one rank, and there are {step.ranks.world_size}: gradients would "
                "have to be added over the ranks one by one, in an order that their backwards need not share. "
                "Leave gradient=in_backward out, or use --nproc 1."
            )
        if step.scaler is not None:
            raise ConfigError(
                "gradient=in_backward does not go with fp16 parameters, whose windows are computed again where "
                "they overflow. Use bf16 parameters, or leave gradient=in_backward out."
            )
        self._optimizer = optimizer
        self._group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for hook in self._hooks:
            hook.remove()
        owners = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        # 16-bit parameters have moved their gradient into an fp32 one by then: that hook was registered before
        self._hooks = [
            owner.register_post_accumulate_grad_hook(self._hook(trained))
            for owner, trained in zip(owners, step.parallel.parameters, strict=True)
        ]

    def remarks(self, model: nn.Module) -> list[str]:
        sizes = gradient_bytes(model)
        return [
            f"gradient=in_backward keeps no gradient: {units.size(sum(sizes) - max(sizes))} less (gradients of "
            f"{units.size(sum(sizes))}, but for the largest parameter's, {units.size(max(sizes))}). Code that is "
            "compiled as one piece gives its gradients at once, which takes that back."
        ]

    # --- the window -----------------------------------------------------------------------------------------

    def __call__(self, window: LoadedWindow, step: Step) -> Update | None:
        if self._optimizer is not None:
            step.begin_update()  # what is updated cannot be taken back
        norms: list[Tensor] = []
        for k, batch in step.batches(window):
            if k and self._optimizer is not None:
                raise ExactnessError("gradient=in_backward met a window of several micro-batches.")
            step.seed(window, k)
            with self._updating() as found:
                step.forward_backward(batch)
            norms = list(found.values())
            del batch
        if self._optimizer is None:  # in verify: the gradient itself is wanted
            return None
        step.masters.copy_to_model()
        norm = nn.utils.get_total_norm(norms) if norms else torch.zeros((), device=step.device)
        is_known = step.device.type == "cpu"  # a GPU tells with the metrics
        return Update(norm, made=bool(torch.isfinite(norm)) if is_known else True)

    def micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        with self._updating():
            step.forward_backward(batch, scale, last=last)

    @contextlib.contextmanager
    def _updating(self) -> Iterator[dict[int, Tensor]]:
        norms: dict[int, Tensor] = {}
        self._norms = norms
        try:
            yield norms
        finally:
            self._norms = None

    def _hook(self, trained: nn.Parameter) -> Callable[[Tensor], None]:
        def update(owner: Tensor) -> None:
            if self._norms is None or trained.grad is None:
                return  # a look at the model, not a window
            if id(trained) in self._norms:
                raise ExactnessError(
                    "a parameter got two gradients in one backward, as with reentrant checkpointing of a part that "
                    "is used twice: gradient=in_backward has updated it by the first. Use use_reentrant=False, or "
                    "leave gradient=in_backward out."
                )
            gradient = trained.grad.coalesce().values() if trained.grad.is_sparse else trained.grad
            self._norms[id(trained)] = torch.linalg.vector_norm(gradient)
            self._step_alone(trained)
            trained.grad = None

        return update

    def _step_alone(self, parameter: nn.Parameter) -> None:
        """The optimizer's step as if it had no other parameter."""
        optimizer = self._optimizer
        assert optimizer is not None
        groups = optimizer.param_groups
        optimizer.param_groups = [{**self._group_of[id(parameter)], "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
