"""What earlier runs of the recipe have measured of the gradient's noise."""

from __future__ import annotations

from collections.abc import Iterable

from gatrain.explain.row import Row, Situation
from gatrain.noise_advice import batch_advice, last_noise_scale


def rows(situation: Situation) -> Iterable[Row]:
    """The noise scale of the newest run that has measured one."""
    if not situation.adds_micro_batches:
        yield Row(
            "noise scale",
            "cannot be measured",
            "It compares the gradient of a part of the window with that of all of it, and here a part has no "
            "gradient of its own (gradient, norm or optimizer see to that).",
        )
        return
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
