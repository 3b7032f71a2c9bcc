"""What a gradient noise scale says of a batch, in words. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

FAR = 4.0
"""Times the interval's end from which on a batch is called far off."""
TAIL_BYTES = 2**16
"""Of a file of metrics, enough for its last lines."""
CAVEATS = (
    "This holds for plain SGD and independent samples; Adam, momentum and a schedule shift it, and packed "
    "documents, samples grouped by length and repeated data bias it. The noise scale grows while a run trains, and "
    "how well it tells the useful batch is disputed (Merrill et al. 2025, arXiv 2505.23971): compare runs of each."
)


def batch_advice(value: float, low: float, high: float, effective_batch: int) -> str:
    """Whether a batch is far from the noise scale, what another one would bring, and how far to trust that.

    A step at batch B makes 1 / (1 + noise / B) of the progress of a step without noise, so it takes (1 + noise / B)
    times the fewest steps and (1 + B / noise) times the fewest samples (McCandlish et al. 2018, arXiv 1812.06162).

    Args:
        value, low, high: the noise scale and its interval, in samples; may be infinite.
        effective_batch: in samples.
    """
    batch = f"A batch of {effective_batch:,} samples"
    if effective_batch > FAR * high:
        said = f"{batch} is far above the noise scale, which is about 0: a much smaller batch does as well."
        if value > 0:
            smaller = proposal(value)
            said = (
                f"{batch} is far above the noise scale: it takes about {1 + effective_batch / value:,.3g} times "
                f"the fewest samples to save few steps. One of {smaller:,} would take about "
                f"{_ratio(value, smaller, effective_batch):,.2g} times the steps."
            )
    elif effective_batch * FAR < low:
        known = value if math.isfinite(value) else low
        said = (
            f"{batch} is far below the noise scale: twice the batch needs almost half the steps. More GPUs at a "
            f"larger batch (up to about {proposal(known):,}) pay in time; on the same GPUs a larger batch by "
            "accumulation takes as long for each sample, and no less time in all."
        )
    else:
        said = f"{batch} is near the noise scale (within {FAR:g} times its interval): no reason to change it."
    return f"{said} {CAVEATS}"


def in_words(value: float, low: float, high: float) -> str:
    """Such as ``1,830 samples (95 %: 1,610 to 2,090)``."""
    if not math.isfinite(value):
        return f"at least {low:,.4g} samples"
    upper = f"{high:,.4g}" if math.isfinite(high) else "unknown"
    return f"{value:,.4g} samples (95 %: {low:,.4g} to {upper})"


def proposal(value: float) -> int:
    """The power of two nearest to a noise scale."""
    return 1 << max(0, round(math.log2(max(1.0, value))))


def _ratio(value: float, batch: int, effective_batch: int) -> float:
    """Steps with ``batch`` over steps with ``effective_batch``."""
    return (1 + value / batch) / (1 + value / effective_batch)


def last_noise_scale(path: Path) -> tuple[float, float, float] | None:
    """Value and interval, in samples, of the last line of a metrics.jsonl in which `noise_scale` measured them."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            metrics = json.loads(line).get("metrics", {})
            low = float(metrics["noise_scale_low"])
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
        value, high = (metrics.get(name) for name in ("noise_scale", "noise_scale_high"))
        return float(value or math.inf), low, float(high or math.inf)
    return None
