"""The ranges of values that come from files, and how a value stands in a message.

Every file that gatrain reads back may be damaged, of another version, or written by somebody else: `gatrain.codec`
checks keys and types, and these functions what a type cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

LARGEST = 2**63
"""Whole numbers are below this."""
LONGEST = 60
"""Characters of a wrong value that a message shows."""


def at_least(lowest: float, **values: float | None) -> None:
    """Check that values are finite and ``lowest`` or more; None counts as not given.

    Raises:
        ValueError: names the first value that is not.
    """
    for name, value in values.items():
        if value is not None and not lowest <= value < math.inf:
            raise ValueError(f"{name} is {shown(value)}, not {lowest:g} or more")


def one_of(allowed: Collection[str], **values: str) -> None:
    """Check that each value is one of ``allowed``.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} is {shown(value)}, not one of {', '.join(allowed)}")


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and without control characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "a number above 2**63" if value > 0 else "a number below -2**63"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
