"""Which operators draw from torch's generators, and in which module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

MOST_NAMED = 3


class NoticeDraws(TorchDispatchMode):
    """Context that notices draws: ``seen`` has an operator and a module for each. Reads the generators' states."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[tuple[str, str], None] = {}
        self._names = {module: name or type(module).__name__ for name, module in model.named_modules()}
        self._inside: list[str] = []

    @property
    def words(self) -> str:
        """What was seen, for a message."""
        found = [f"{operator} in {module}" if module else operator for operator, module in self.seen]
        return ", ".join(found[:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")

    def __enter__(self) -> NoticeDraws:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(self._names.get(module, type(module).__name__))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()

        self._handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        before = _states()
        out = func(*args, **kwargs)
        moved = any(not torch.equal(a, b) for a, b in zip(before, _states(), strict=True))
        if moved:  # many a kernel of attention bears the tag, and draws nothing without dropout
            name = str(getattr(func, "_schema", func).name).removeprefix("aten::")
            self.seen[name, self._inside[-1] if self._inside else ""] = None
        return out


def _states() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]
