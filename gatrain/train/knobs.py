"""Further ways to compute the same step faster: a person's own knobs, that trials measure and a plan decides.

A knob changes how a step is computed and not what: trials compare its losses with those of the step without it, and
refuse a value that gives other ones. A user's own is any class with these members, named in a recipe::

    knobs: [{_target_: my_module.MyKnob}]
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch

from gatrain.errors import ConfigError, PlanError

Value = bool | int | float | str


@runtime_checkable
class Knob(Protocol):
    """One thing about a step that can be set in several ways."""

    name: str
    """What plans call it, such as ``attention``."""
    words: str
    """What it changes, in one sentence for the plan that takes it."""

    def values(self, device: torch.device) -> Sequence[Value]:
        """Values worth measuring on this device beside leaving it alone; the same on every rank."""

    def apply(self, value: Value) -> AbstractContextManager[object]:
        """Hold ``value`` while the model is built and steps are computed; nothing of it may stay afterwards."""


class Knobs:
    """The knobs that a configuration names, by their names."""

    def __init__(self, knobs: Mapping[str, Knob]) -> None:
        self._knobs = knobs

    def offers(self, device: torch.device) -> list[dict[str, object]]:
        """Name, values and words of each, for the tuner.

        Raises:
            ConfigError: a knob has values that no plan can hold.
        """
        return [
            {"name": name, "values": _values(name, knob.values(device)), "words": str(knob.words)}
            for name, knob in self._knobs.items()
        ]

    @contextlib.contextmanager
    def applied(self, values: Mapping[str, Value], plan_anew: str = "plan again") -> Iterator[None]:
        """Hold these values; a knob that is not named is left alone.

        Args:
            plan_anew: what to type where the configuration has no such knob.

        Raises:
            PlanError: the configuration has no such knob.
            ConfigError: ``apply`` of one gives no context manager.
        """
        with contextlib.ExitStack() as stack:
            for name, value in values.items():
                if name not in self._knobs:
                    raise PlanError(
                        f"the plan computes steps with {name}={value}, and the configuration names no such knob. "
                        f"Put it back, or plan without it: {plan_anew}"
                    )
                held = self._knobs[name].apply(value)
                if not isinstance(held, AbstractContextManager):
                    raise ConfigError(
                        f"knob '{name}': apply({value!r}) gave a {type(held).__name__}, where a context manager is "
                        "needed. Write @contextlib.contextmanager above it and yield where the value is held."
                    )
                stack.enter_context(held)
            yield


def _values(name: str, given: object) -> list[Value]:
    """The values once each: a plan is a file, and can hold no others than these."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(
            f"knob '{name}': values(device) gave {given!r}, where a list of values is needed, such as [1, 2]."
        )
    values: list[Value] = []
    for value in given:
        known = isinstance(value, bool | int | float | str)
        if not known or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(
                f"knob '{name}': values(device) gave {value!r}, which a plan cannot hold. Give True or False, "
                "finite numbers or text, such as 'small', and look up in apply(value) what it stands for; leaving "
                "the knob alone is always measured, and needs no value."
            )
        if not any(value == each and type(value) is type(each) for each in values):
            values.append(value)
    return values


def by_name(made: Sequence[tuple[str, object]]) -> Knobs:
    """The knobs made from a configuration, each with its place in it.

    Raises:
        ConfigError: one is no knob, or two have one name.
    """
    found: dict[str, Knob] = {}
    for where, knob in made:
        missing = [member for member in ("name", "words", "values", "apply") if not hasattr(knob, member)]
        if missing or not isinstance(knob, Knob):
            raise ConfigError(
                f"{where} gave a {type(knob).__name__} without {', '.join(missing)}. A knob has name, words, "
                "values(device) and apply(value): see gatrain.train.knobs."
            )
        if knob.name in found or knob.name in ("precision", "checkpointing", "compile", "sync"):
            raise ConfigError(
                f"{where}: there is a knob of the name {knob.name!r} already. Give it another name."
            )
        found[knob.name] = knob
    return Knobs(found)
