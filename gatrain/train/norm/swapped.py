"""What is the process's and not a thread's, for forwards that take turns."""

from __future__ import annotations

from typing import Any, NamedTuple

from gatrain.train.norm.look import Look
from gatrain.train.seeding import host_random_state, same_host_random_state, set_host_random_state
from gatrain.train.step import Step

_MISSING = object()


class Kept(NamedTuple):
    """Of one forward."""

    attributes: list[Any]
    numbers: Any = None
    """Random ones; None before it has begun."""
    on_host: Any = None


class Swapped:
    """Random numbers, and attributes of modules that a forward sets, as each forward left them.

    Args:
        draws_on_host: Python's and numpy's numbers, too, which takes some hundred microseconds at each pause.
            Without, `drew_on_host` tells whether there was need.
    """

    def __init__(self, step: Step, look: Look, *, draws_on_host: bool) -> None:
        self._step, self._draws_on_host = step, draws_on_host
        self._places = [(vars(step.model.get_submodule(module)), name) for module, name in look.attributes]
        self.before = Kept(self._attributes())
        """For a forward that begins."""
        self._noted: Any = None

    def now(self) -> Kept:
        on_host = host_random_state() if self._draws_on_host else None
        return Kept(self._attributes(), self._step.random.state(), on_host)

    def put(self, kept: Kept) -> None:
        if kept.numbers is not None:
            self._step.random.resume(kept.numbers)
        if kept.on_host is not None:
            set_host_random_state(kept.on_host)
        for (attributes, name), value in zip(self._places, kept.attributes, strict=True):
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    def note_host(self) -> None:
        """After the last forward was seeded: what any draws from here on, between the others, is seen."""
        if not self._draws_on_host:
            self._noted = host_random_state()

    def drew_on_host(self) -> bool:
        return not self._draws_on_host and not same_host_random_state(self._noted, host_random_state())

    def _attributes(self) -> list[Any]:
        return [attributes.get(name, _MISSING) for attributes, name in self._places]
