"""Accumulation steps: one number, or a number from each epoch on (``{0: 4, 8: 8}``)."""

from __future__ import annotations

from collections.abc import Mapping

from gatrain.errors import ConfigError

Steps = int | Mapping[int, int]
"""Micro-batches of a window on each rank. As a mapping: from an epoch, counted from 0, on; 1 before the
first."""


def checked_steps(steps: Steps) -> Steps:
    """The steps, as they are.

    Raises:
        ConfigError: a number of steps below 1, or an epoch below 0.
    """
    if not isinstance(steps, Mapping):
        _check(steps, "accumulation_steps", 1)
        return steps
    if not steps:
        raise ConfigError("accumulation_steps={} has no epoch. Write for example {0: 4, 8: 8}.")
    for epoch, factor in steps.items():
        _check(epoch, "an epoch of accumulation_steps", 0)
        _check(factor, f"accumulation_steps from epoch {epoch} on", 1)
    return dict(steps)


def steps_at(steps: Steps, epoch: int | None) -> int:
    """Accumulation steps in an epoch.

    Raises:
        ConfigError: they depend on the epoch, and it is not given.
    """
    if not isinstance(steps, Mapping):
        return steps
    if epoch is None:
        raise ConfigError(
            f"accumulation_steps={dict(steps)} depends on the epoch, which is not given. Write "
            "accumulator.windows(batches, epoch=epoch), or optimizer.set_epoch(epoch) for an "
            "AccumulatingOptimizer."
        )
    begun = [first for first in steps if first <= epoch]
    return steps[max(begun)] if begun else 1


def _check(value: object, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
