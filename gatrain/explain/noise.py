"""What earlier runs of the recipe have measured of the gradient's noise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from gatrain.explain.row import Row, Situation
from gatrain.noise_advice import batch_advice

TAIL_BYTES = 2**16
"""Of a file of metrics, enough for its last lines."""


def rows(situation: Situation) -> Iterable[Row]:
    """The noise scale of the newest run that has measured one."""
    effective = situation.plan.effective_batch
    folder = situation.cwd / "outputs" / situation.recipe
    for path in sorted(folder.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True):
        found = last_noise_scale(path)
        if found is not None:
            value, low, high = found
            yield Row(
                "noise scale",
                f"{value:,.4g} samples in outputs/{situation.recipe}/{path.parent.name}",
                batch_advice(value, low, high, effective),
            )
            return
    measured, proposed = (situation.command(word) for word in ("hooks=[noise_scale]", "batch.effective=auto"))
    yield Row(
        "noise scale",
        "not measured",
        f"How large a batch pays is told by the gradient's noise: {measured} measures it as it trains, and "
        f"{proposed} proposes a batch after a short run.",
    )


def last_noise_scale(path: Path) -> tuple[float, float, float] | None:
    """Value and interval of the last line of a metrics.jsonl that has one."""
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
