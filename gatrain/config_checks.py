"""Checks of single values of the configuration, in the words that a person reads."""

from __future__ import annotations

from typing import Any

from gatrain import units
from gatrain.errors import ConfigError, nearest

LARGEST = 2**63


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{key}={units.as_typed(value)} is not one of {', '.join(allowed)}.{nearest(str(value), allowed)}"
        )


def at_least(key: str, value: float, lowest: int) -> None:
    if not value >= lowest:  # written so that nan is refused too
        raise ConfigError(f"{key}={value} is below {lowest}, the smallest value allowed.")
    if isinstance(value, int) and value >= LARGEST:
        raise ConfigError(f"{key}={value} is not below 2**63, the largest value that files and tensors hold.")


def above_zero(key: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key}={value} is not a positive finite number.")
