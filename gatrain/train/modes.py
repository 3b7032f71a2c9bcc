"""What hooks change in a model beside its numbers: which parts are in training mode, what wants a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gatrain.errors import ExactnessError, SavedStateError

_ODD = "the saved state has a part 'hooks' whose modes gatrain did not write."


class Modes:
    """Notes a model as it was made, and what is other in it since.

    A hook may freeze a layer, or let its BatchNorm go by running statistics, from some step on: a run that goes on
    from a later step would know nothing of it, so it is a part of the saved state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._trains = model, model.training
        self._modes, self._wants = _modes_of(model), _wants_of(model)

    def check(self, hook: str) -> None:
        """After a call of a hook.

        Raises:
            ExactnessError: it left the whole model in another mode.
        """
        if self._model.training is self._trains:
            return
        here, before = ("evaluation", "model.train()") if self._trains else ("training", "model.eval()")
        self._model.train(self._trains)
        raise ExactnessError(
            f"the hook {hook} left the model in {here} mode, in which the run would train on without a word. Call "
            f"{before} at its end; the mode of single layers may be changed for good."
        )

    def changed(self) -> dict[str, dict[str, bool]]:
        """By name, the mode of each part and the ``requires_grad`` of each parameter that is another by now."""
        return {
            "training": _others(_modes_of(self._model), self._modes),
            "requires_grad": _others(_wants_of(self._model), self._wants),
        }

    def restore(self, changed: Mapping[str, Any]) -> None:
        """Let what `changed` gave be all that is other than in the model as it was made.

        Raises:
            SavedStateError: something else was given.
        """
        if not isinstance(changed, dict) or changed.keys() != {"training", "requires_grad"}:
            raise SavedStateError(_ODD)
        for part in changed.values():
            if not isinstance(part, dict) or not all(type(value) is bool for value in part.values()):
                raise SavedStateError(_ODD)
        modes, wants = self._modes | changed["training"], self._wants | changed["requires_grad"]
        for name, module in self._model.named_modules():
            module.training = modes[name]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad is not wants[name]:
                parameter.requires_grad_(wants[name])


def _modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _wants_of(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _others(now: Mapping[str, bool], before: Mapping[str, bool]) -> dict[str, bool]:
    return {name: value for name, value in now.items() if value is not before.get(name, value)}
