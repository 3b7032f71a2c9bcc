"""Numbers and texts in modules' attributes: a resumed run has those of the constructor again."""

from __future__ import annotations

from torch import nn

Place = tuple[str, str]
"""(module, attribute)."""


class ModuleNumbers:
    """Notes a model's attributes when training begins, and what is other in them since."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._begun = model, _numbers_of(model)

    def unsaved(self) -> str:
        """A sentence where some have changed; else ''."""
        now = _numbers_of(self._model)
        changed = [place for place, value in now.items() if value != self._begun.get(place, value)]
        if not changed:
            return ""
        (module, attribute), number = changed[0], len(changed) - 1
        owner = f"{type(self._model.get_submodule(module)).__name__} ('{module}')"
        more = f" and {number} more" if number else ""
        return (
            f"{attribute} of {owner}{more} is another than at the start and is not saved: after a resume it is the "
            "constructor's again until something sets it. A hook that sets it by the step shall do so in "
            "Hook.start, too (run.step says where the run goes on), a model keeps it in a buffer."
        )


def _numbers_of(model: nn.Module) -> dict[Place, object]:
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) in (bool, int, float, str)
        and attribute != "training"
        and not attribute.startswith("_")
    }
