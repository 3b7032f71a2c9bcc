"""Several optimizers that train parts of one model in turn: GANs, actor and critic. ``gradient=phases``.

A task with ``phases`` gives each phase its loss. For every phase of a window, in order: the gradient of its loss
over the whole window, of its own parameters alone, at the weights that the phases before it have left; then one
update by its own optimizer. So each update is that of the whole window, whatever the split.

While one phase computes, the parameters of the others want no gradient: what goes through them leaves none behind,
and a generator's samples need no ``detach()`` in the discriminator's loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gatrain.batch_rule import OF_ADAM
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, ExactnessError, nearest
from gatrain.phase_config import phase_configs
from gatrain.tasks.base import Batch, LossSums, phase_loss_sum, phases_of
from gatrain.train.clipping import Clipping
from gatrain.train.gradient import GradientStrategy, StepCost, Update
from gatrain.train.guard import Guard
from gatrain.train.micro_batches import LoadedWindow
from gatrain.train.modules import sparse_parameters
from gatrain.train.phased_optimizer import Part, PhasedOptimizer
from gatrain.train.undo import Undo

if TYPE_CHECKING:
    from gatrain.train.step import Step


@dataclass
class _Phase:
    name: str
    terms: tuple[str, ...]
    updates: int
    """In each window in which it has a turn, each over the whole window."""
    every: int
    """It has a turn in each n-th window."""
    part: Part
    parameters: list[nn.Parameter]
    """Of the model itself."""
    clip: Clipping
    guard: Guard
    undo: Undo
    has_gradients: bool = False
    """Known from its first update on."""


class Phases(GradientStrategy):
    """One update after the other, each with the gradient of its phase over the whole window.

    Args:
        updates: for a phase, how many updates it makes in a window instead of one. Each is over the whole window,
            with random numbers of its own (``loss_sum``'s ``update`` counts them).
        every: for a phase, that it has its turn in every n-th window only: ``{generator: 5}`` lets the other phases
            make five updates, each with samples of its own, for one of the generator's.
    """

    exact = (
        "each phase's gradient over the whole window, at the weights that earlier phases left, for losses that are "
        "sums over samples"
    )
    trains_phases = True
    cost = StepCost()  # `micro_step` makes every pass

    def __init__(
        self, updates: Mapping[str, int] | None = None, every: Mapping[str, int] | None = None
    ) -> None:
        self._updates, self._every = dict(updates or {}), dict(every or {})
        for key, given in (("updates", self._updates), ("every", self._every)):
            for name, count in given.items():
                if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                    raise ConfigError(f"gradient.{key}.{name}={count!r} is not a whole number of at least 1.")
        self._phases: list[_Phase] = []

    def check(self, config: RunConfig) -> None:
        if config.precision == "fp16":
            raise ConfigError(
                "gradient=phases does not go with precision=fp16: its phases would need loss scales of their own, "
                "agreed on before the first of them makes its update. Use precision=bf16 or precision=fp32."
            )
        if config.batch.rule in OF_ADAM:
            raise ConfigError(
                f"gradient=phases does not go with batch.rule={config.batch.rule}, which changes the betas of one "
                "optimizer. Use batch.rule=linear, or leave it out and set each phase's lr."
            )

        for name, phase in phase_configs(config.optimizer).items():
            if (needed := phase.optimizer.gradient) is not None:
                raise ConfigError(
                    f"optimizer.phases.{name}.name={phase.optimizer.name} takes gradients as gradient={needed} "
                    f"gives them, and gradient=phases is another way. Use optimizer.phases.{name}.name=adamw."
                )

    def set_up(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, PhasedOptimizer) or step.task is None:
            raise ConfigError(
                "gradient=phases is for a task with phases, and this one has none. Use gradient=plain."
            )
        if step.scaler is not None:
            raise ConfigError("gradient=phases does not go with fp16 parameters. Use bf16 or fp32 ones.")
        terms = phases_of(step.task)
        self._check_names(terms)
        sparse = sparse_parameters(step.model)
        self._phases = [
            _Phase(
                name=name,
                terms=terms[name],
                updates=self._updates.get(name, 1),
                every=self._every.get(name, 1),
                part=part,
                parameters=part.parameters,
                clip=Clipping(part.clips, step.model, step.masters.of, sparse),
                guard=Guard(step.model, part.optimizer, step.device, at_once=True),
                undo=Undo(part.optimizer),
            )
            for name, part in optimizer.parts.items()
        ]
        optimizer.most_updates = max(phase.updates for phase in self._phases)
        for phase in self._phases[: None if self._phases[-1].updates > 1 else -1]:
            phase.undo.keep()  # now, so that trials hold this memory too

    def _check_names(self, phases: Mapping[str, Any]) -> None:
        for key, given in (("updates", self._updates), ("every", self._every)):
            for name in given:
                if name not in phases:
                    raise ConfigError(
                        f"gradient.{key}.{name}: the task has no such phase.{nearest(name, phases)} It has: "
                        f"{', '.join(phases)}."
                    )
        if self._every and min(self._every.get(name, 1) for name in phases) > 1:
            raise ConfigError(
                "gradient.every leaves windows in which no phase has its turn. Leave one phase out of it."
            )

    # --- a window -----------------------------------------------------------------------------------------

    def passes(self, step: Step) -> dict[str, int]:
        return {
            term: phase.updates if self._has_turn(phase, step) else 0
            for phase in self._phases
            for term in phase.terms
        }

    def _has_turn(self, phase: _Phase, step: Step) -> bool:
        return (step.number + 1) % phase.every == 0  # by updates made before: a resume goes on alike

    def __call__(self, window: LoadedWindow, step: Step) -> Update:
        """Every phase's updates, or none of them: a window that fails or is not finite leaves all as it was."""
        turns = [
            (nth, update)
            for nth, phase in enumerate(self._phases)
            if any(
                step.scale[term] for term in phase.terms
            )  # 0: it has no turn, or no sample has a weight for it
            for update in range(phase.updates)
        ]
        undone_by = [self._phases[nth].undo for nth in dict.fromkeys(nth for nth, _ in turns[:-1])]
        for undo in undone_by:
            undo.keep()
        norms: dict[str, Tensor] = {}
        self._begun = (-1, -1)
        try:
            for nth, update in turns:
                norm, made = self._update(window, step, nth, update)
                norms[self._phases[nth].name] = norm
                if not made:
                    self._take_back(step, undone_by)
                    return Update(norm, made=False)
        except Exception:
            if self._begun != turns[-1]:  # the last update is not kept: nothing comes after it
                with contextlib.suppress(RuntimeError):  # of a device that no longer answers
                    self._take_back(step, undone_by)
            raise
        metrics: dict[str, Tensor | float] = {f"{name}.grad_norm": norm for name, norm in norms.items()}
        metrics |= {f"{each.name}.lr": each.part.rate for each in self._phases if each.name in norms}
        return Update(torch.stack(list(norms.values())).norm(), made=True, metrics=metrics)

    def _update(self, window: LoadedWindow, step: Step, nth: int, update: int) -> tuple[Tensor, bool]:
        """One update of one phase: the norm of its gradient, and whether it was made. Collective."""
        phase = self._phases[nth]
        if window.seed is not None:  # each pass draws numbers of its own
            window = dataclasses.replace(window, seed=(*window.seed, nth, update))
        with self._alone(phase):
            for k, batch in step.batches(window):
                step.seed(window, k)
                step.forward_backward(batch, loss_sum=lambda batch: self._loss_of(step, phase, batch, update))
                del batch
        self._refuse_without_gradient(step, phase)
        step.parallel.reduce()
        self._begun = nth, update
        step.begin_update()
        norm = phase.clip(step.parallel)
        made = phase.guard.step(norm, step.counts.are_bad(phase.terms, step.device))
        step.masters.copy_to_model()
        step.parallel.drop_gradients()
        return norm, made

    def _take_back(self, step: Step, undone_by: list[Undo]) -> None:
        for undo in undone_by:
            undo.restore()
        step.masters.copy_to_model()
        step.parallel.drop_gradients()
        step.nothing_updated()

    def _loss_of(self, step: Step, phase: _Phase, batch: Batch, update: int) -> LossSums:
        assert step.task is not None
        sums = phase_loss_sum(step.task, step.method("loss_sum"), batch, phase.name, step.number, update)
        if torch.is_grad_enabled() and not any(total.requires_grad for total, _ in sums.values()):
            raise ExactnessError(_without_gradient(phase.name))
        return sums

    @contextlib.contextmanager
    def _alone(self, phase: _Phase) -> Iterator[None]:
        """In here the parameters of this phase alone want a gradient."""
        others = [
            p for each in self._phases if each is not phase for p in each.parameters if p.requires_grad
        ]  # a hook may have frozen some
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _refuse_without_gradient(self, step: Step, phase: _Phase) -> None:
        """At a phase's first update: whether its loss reaches its parameters on any rank. Collective."""
        if phase.has_gradients:
            return
        given = any(parameter.grad is not None for parameter in step.parallel.parameters)
        if not step.parallel.agree(given):
            raise ExactnessError(_without_gradient(phase.name))
        phase.has_gradients = True

    def micro_step(
        self, step: Step, batch: Batch, scale: Mapping[str, float] | None = None, *, last: bool = False
    ) -> None:
        """A micro-batch through every phase, as trials time it."""
        for phase in self._phases:
            with self._alone(phase):
                for update in range(phase.updates):
                    step.forward_backward(
                        batch,
                        scale,
                        loss_sum=lambda batch, u=update, p=phase: self._loss_of(step, p, batch, u),  # type: ignore[misc]
                    )


def _without_gradient(name: str) -> str:
    return (
        f"the loss of the phase {name!r} gives none of its parameters a gradient, so they would never move: it "
        "does not depend on them, or is detached from them. Mind that loss_sum() gets phase, and that "
        f"optimizer.phases.{name}.match names the parameters that this loss is for."
    )
