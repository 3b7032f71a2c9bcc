"""Quantities as people read them: bytes, seconds, rates, counts. One quantity has one spelling."""

from __future__ import annotations

import json
import math
from typing import Any

KIB, MIB, GIB = 2**10, 2**20, 2**30


def size(count: float) -> str:
    """Write bytes: ``1.9 GiB``, ``312 MiB``, ``7 KiB``."""
    if count >= GIB:
        return f"{count / GIB:,.1f} GiB"
    return f"{count / MIB:,.0f} MiB" if count >= MIB else f"{count / KIB:,.0f} KiB"


def seconds(value: float) -> str:
    """Write the time of something short, such as one step: ``0.081 ms``, ``8.12 ms``, ``413 ms``, ``2.31 s``."""
    if not math.isfinite(value):
        return f"{value} s"
    if value >= 1:
        return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"
    return f"{value * 1e3:.3g} ms"


def seconds_range(low: float, high: float) -> str:
    """Write a range of seconds with two digits, in the unit of the higher: ``54 to 81 ms``."""
    factor, unit = (1.0, "s") if high >= 1 else (1e3, "ms")
    return f"{low * factor:.2g} to {high * factor:.2g} {unit}"


def duration(value: float) -> str:
    """Write a span: ``42s``, ``1m 12s``, ``2h 05m``, ``3d 04h``."""
    whole = int(value + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def rate(value: float) -> str:
    """Write a rate with a thousands separator where it is large and digits where it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def plural(count: int, noun: str) -> str:
    """Write ``1 step``, ``1,200 steps``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def as_typed(value: Any) -> str:
    """A value as a person types it: null and true, not None and True."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
